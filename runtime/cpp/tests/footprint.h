/* Resident memory of this process in KiB, by Linux's count. */
#ifndef FOOTPRINT_H
#define FOOTPRINT_H

#include <stdio.h>

static inline long resident(const char* field) {
  char line[256], format[64];
  long found = 0;
  FILE* file = fopen("/proc/self/status", "r");
  snprintf(format, sizeof format, "%s: %%ld", field);
  while (file != NULL && fgets(line, sizeof line, file) != NULL) sscanf(line, format, &found);
  if (file != NULL) fclose(file);
  return found;
}

/* All of it, without what is only mapped from files, and the highest that it was. */
static inline void print_footprint(void) {
  printf("resident %ld anonymous %ld peak %ld\n", resident("VmRSS"), resident("RssAnon"), resident("VmHWM"));
}

#endif
