CORE = cortex_m
CPU = cortex-m0
GC_HELPER = gchelper_thumb1
