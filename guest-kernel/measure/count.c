/*
 * A QEMU TCG plugin that counts guest instructions by the address of their block, from reset to the first time that
 * the guest runs the block at MARK (the first instruction of init), and between later marks (MARK + n * 4096).
 * Each phase goes to a file OUT.n of lines "address instructions".
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* As in qemu-plugin.h, which Debian does not package. */
typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
typedef void (*tb_cb)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*exec_cb)(unsigned, void *);
typedef void (*udata_cb)(qemu_plugin_id_t, void *);
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, tb_cb);
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, exec_cb, int flags, void *);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int op, void *, uint64_t);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
extern void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, udata_cb, void *);
__attribute__((visibility("default"))) int qemu_plugin_version = 1;

#define SLOTS (1 << 20)
#define MARK 0x10000000ull
#define MARKS 64
static struct slot { uint64_t address, length, count; } slots[SLOTS];
static const char *out = "count";
static unsigned phase;

static struct slot *slot(uint64_t address, uint64_t length)
{
	uint64_t i = ((address * 0x9e3779b97f4a7c15ull) ^ length) >> 40 & (SLOTS - 1);
	while (slots[i].length && (slots[i].address != address || slots[i].length != length))
		i = (i + 1) & (SLOTS - 1);
	slots[i].address = address;
	slots[i].length = length;
	return &slots[i];
}

static void dump(void)
{
	char name[512];
	snprintf(name, sizeof(name), "%s.%u", out, phase++);
	FILE *f = fopen(name, "w");
	for (size_t i = 0; f && i < SLOTS; i++) {
		if (slots[i].count)
			fprintf(f, "%" PRIx64 " %" PRIu64 "\n", slots[i].address, slots[i].count);
		slots[i].count = 0;
	}
	if (f)
		fclose(f);
}

static void mark(unsigned vcpu, void *data) { dump(); }
static void at_exit(qemu_plugin_id_t id, void *data) { dump(); }

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	uint64_t address = qemu_plugin_tb_vaddr(tb), length = qemu_plugin_tb_n_insns(tb);

	if (address >= MARK && address < MARK + MARKS * 4096 && address % 4096 == 0)
		qemu_plugin_register_vcpu_tb_exec_cb(tb, mark, 0, NULL);
	qemu_plugin_register_vcpu_tb_exec_inline(tb, 0, &slot(address, length)->count, length);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc, char **argv)
{
	if (argc > 0 && !strncmp(argv[0], "out=", 4))
		out = strdup(argv[0] + 4);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	qemu_plugin_register_atexit_cb(id, at_exit, NULL);
	return 0;
}
