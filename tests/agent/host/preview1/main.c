// An ordinary program: tells what it was given, keeps a line in a file, and fails as its last argument says.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) printf("argument %s\n", argv[i]);
    const char *unit = getenv("unit");
    printf("unit %s\n", unit ? unit : "none");
    FILE *file = fopen("/data/kept", "a+");
    if (file) {
        fputs("line\n", file);
        rewind(file);
        char line[80];
        int lines = 0;
        while (fgets(line, sizeof line, file)) lines++;
        printf("lines %d\n", lines);
        fclose(file);
    } else {
        printf("no file\n");
    }
    printf("time %s\n", time(NULL) > 1700000000 ? "now" : "past");
    fprintf(stderr, "a warning\n");
    return argc > 1 && !strcmp(argv[argc - 1], "fail") ? 3 : 0;
}
