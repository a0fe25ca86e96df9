/* Clock of some processes alone: CLOCK_REALTIME is what a file says away from the kernel's, in nanoseconds.
 *
 * LD_PRELOAD=clock_shim.so CLOCK_SHIM=FILE PROGRAM; the file has one signed 64-bit number, which may change at any time.
 * The mapping outlives fork and sandboxes. Timers for a time of day end when the shifted clock would show it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL

static const volatile long long nothing = 0;
static const volatile long long *away = &nothing;

__attribute__((constructor)) static void begin(void)
{
	const char *path = getenv("CLOCK_SHIM");
	int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	void *mapped = fd < 0 ? MAP_FAILED : mmap(0, sizeof *away, PROT_READ, MAP_SHARED, fd, 0);
	if (mapped != MAP_FAILED)
		away = mapped;
	if (fd >= 0)
		close(fd);
}

static void shift(struct timespec *at, long long by)
{
	long long all = at->tv_sec * SECOND + at->tv_nsec + by;
	at->tv_sec = all / SECOND;
	at->tv_nsec = all % SECOND;
}

int clock_gettime(clockid_t id, struct timespec *at)
{
	int done = syscall(SYS_clock_gettime, id, at);
	if (!done && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
		shift(at, *away);
	return done;
}

int gettimeofday(struct timeval *at, void *zone)
{
	struct timespec now;
	(void)zone;
	clock_gettime(CLOCK_REALTIME, &now);
	at->tv_sec = now.tv_sec;
	at->tv_usec = now.tv_nsec / 1000;
	return 0;
}

time_t time(time_t *at)
{
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	if (at)
		*at = now.tv_sec;
	return now.tv_sec;
}

int timerfd_settime(int fd, int flags, const struct itimerspec *new, struct itimerspec *old)
{
	struct itimerspec shifted = *new;
	if ((flags & TFD_TIMER_CANCEL_ON_SET) && shifted.it_value.tv_sec)
		shift(&shifted.it_value, -*away);
	return syscall(SYS_timerfd_settime, fd, flags, &shifted, old);
}
