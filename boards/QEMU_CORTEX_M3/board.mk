CORE = cortex_m
CPU = cortex-m3
GC_HELPER = gchelper_thumb2
