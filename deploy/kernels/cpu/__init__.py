"""The native CPU runtime: `library` loads it, `src/understudy_cpu.h` documents its C interface."""
