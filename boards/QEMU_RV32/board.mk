CORE = rv32
