/* One library for every machine: of a function under WIDE the loader picks the form for the processor it runs on. */
#ifndef CPU_FORMS_H
#define CPU_FORMS_H

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDE
#endif

#endif
