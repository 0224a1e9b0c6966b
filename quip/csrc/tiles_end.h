// Functions are compiled for any processor again.
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC reset_options
#endif
