/* The init of the measurement: does what a container's start does, with a mark (see count.c) before each step. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/reboot.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define MARK(n) __attribute__((section(".mark" #n), naked, noinline, used)) void mark##n(void)
#define RETURN { __asm__("ret"); }
MARK(1) RETURN
MARK(2) RETURN
MARK(3) RETURN
MARK(4) RETURN
MARK(5) RETURN
MARK(6) RETURN
MARK(7) RETURN
MARK(8) RETURN
MARK(9) RETURN

static long call(long number, long a, long b, long c, long d, long e)
{
	long result;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = 0;
	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
	return result;
}
#define CALL(n, a, b, c, d, e) call(SYS_##n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e))

static void say(const char *text)
{
	long length = 0;
	while (text[length])
		length++;
	CALL(write, 1, text, length, 0, 0);
}
static void check(const char *what, long result)
{
	if (result < 0) {
		say("init: failed: ");
		say(what);
		char number[5] = { ' ', '0' + -result / 100 % 10, '0' + -result / 10 % 10, '0' + -result % 10, '\n' };
		CALL(write, 1, number, 5, 0, 0);
	}
}
static void put(const char *path, const char *text, long length)
{
	long file = CALL(open, path, O_WRONLY, 0, 0, 0);
	check(path, file);
	check(path, CALL(write, file, text, length, 0, 0));
	CALL(close, file, 0, 0, 0, 0);
}

static void child(int exec)
{
	static char *arguments[] = { "/init", "child", 0 }, *environment[] = { 0 };
	long pid = CALL(fork, 0, 0, 0, 0, 0);
	if (pid == 0) {
		if (exec)
			CALL(execve, "/init", arguments, environment, 0, 0);
		CALL(exit_group, 0, 0, 0, 0, 0);
	}
	check("fork", pid);
	check("wait", CALL(wait4, pid, 0, 0, 0, 0));
}

__attribute__((used)) void start(long *stack)
{
	if (stack[0] > 1)
		CALL(exit_group, 0, 0, 0, 0, 0);
	mark1(); /* mounts */
	check("devtmpfs", CALL(mount, "dev", "/dev", "devtmpfs", 0, 0));
	check("proc", CALL(mount, "proc", "/proc", "proc", 0, 0));
	check("sysfs", CALL(mount, "sysfs", "/sys", "sysfs", 0, 0));
	check("cgroup2", CALL(mount, "cgroup2", "/sys/fs/cgroup", "cgroup2", 0, 0));
	check("tmpfs", CALL(mount, "tmpfs", "/tmp", "tmpfs", 0, 0));
	mark2(); /* fork, exit, wait */
	child(0);
	mark3(); /* fork, exec, exit, wait */
	child(1);
	mark4(); /* the namespaces but that of the network */
	check("unshare", CALL(unshare, CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWCGROUP, 0, 0, 0, 0));
	mark5(); /* a network namespace */
	check("unshare", CALL(unshare, CLONE_NEWNET, 0, 0, 0, 0));
	mark6(); /* a cgroup with its controllers */
	put("/sys/fs/cgroup/cgroup.subtree_control", "+memory +cpu +pids +io +cpuset", 30);
	check("mkdir", CALL(mkdir, "/sys/fs/cgroup/c", 0755, 0, 0, 0));
	put("/sys/fs/cgroup/c/cgroup.procs", "0", 1);
	mark7(); /* 100 page faults */
	char *memory = (char *)CALL(mmap, 0, 100 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	for (int page = 0; page < 100; page++)
		memory[page * 4096] = 1;
	mark8(); /* 100 small system calls */
	for (int n = 0; n < 100; n++)
		CALL(getppid, 0, 0, 0, 0, 0);
	mark9();
	say("init: done\n");
	CALL(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_RESTART, 0, 0);
}
__asm__(".section .mark0,\"ax\"\n.global _start\n_start: xor %ebp,%ebp\nmov %rsp,%rdi\nand $-16,%rsp\ncall start\n");
