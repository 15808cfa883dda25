/*
 * The state in which the monitor enters a guest: long mode, the first GiB mapped, boot_params at 0x7000, an MP table for
 * one processor at 0x9fc00. QEMU's generic loader puts this at 0x500, "firmware" below at the reset vector.
 * MEMORY, INITRD, INITRD_SIZE, ENTRY and COMMAND_LINE come from the script.
 */
#ifdef FIRMWARE
	.code16
	.org 0
start:	cli
	lgdtl %cs:gdtr
	movl %cr0, %eax
	orl $1, %eax
	movl %eax, %cr0
	ljmpl $8, $0x8000
gdtr:	.word 0x27
	.long 0x500
	.org 0xfff0
	jmp start
	.org 0xffff
	.byte 0
#else
	.set base, 0x500
	.org 0x500 - base
	.quad 0, 0x00cf9b000000ffff, 0x00af9b000000ffff, 0x00cf93000000ffff, 0

	.org 0x7000 + 0x1e8 - base
	.byte 2				/* e820_entries */
	.org 0x7000 + 0x1fe - base
	.word 0xaa55
	.org 0x7000 + 0x202 - base
	.long 0x53726448
	.org 0x7000 + 0x210 - base
	.byte 0xff
	.org 0x7000 + 0x218 - base
	.long INITRD, INITRD_SIZE
	.org 0x7000 + 0x228 - base
	.long 0x20000
	.org 0x7000 + 0x230 - base
	.long 0x1000000
	.org 0x7000 + 0x238 - base
	.long command_end - command - 1
	.org 0x7000 + 0x2d0 - base
	.quad 0, 0x9fc00
	.long 1
	.quad 0x100000, MEMORY - 0x100000
	.long 1

	.org 0x8000 - base
	.code32
	movl $0x18, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl $0x20, %eax
	movl %eax, %cr4
	movl $0x9000, %eax
	movl %eax, %cr3
	movl $0xc0000080, %ecx
	movl $0x100, %eax
	xorl %edx, %edx
	wrmsr
	movl $0x80050033, %eax
	movl %eax, %cr0
	ljmpl $0x10, $0x8000 + long - tramp
	.code64
	.org 0x8080 - base
	movl $0x7000, %esi
	movl $0x8ff0, %esp
	movl $ENTRY, %eax
	jmp *%rax
	.set tramp, 0
	.set long, 0x80

	.org 0x9000 - base
	.quad 0xa003
	.org 0xa000 - base
	.quad 0xb003
	.org 0xb000 - base
	.set page, 0
	.rept 512
	.quad page * 0x200000 + 0x83
	.set page, page + 1
	.endr

	.org 0x20000 - base
command: .asciz COMMAND_LINE
command_end:

	.org 0x9fc00 - base
	.ascii "_MP_"
	.long 0x9fc10
	.byte 1, 4, MP_SUM, 0, 0, 0, 0, 0
table:	.ascii "PCMP"
	.word table_end - table
	.byte 4, TABLE_SUM
	.ascii "CAISSON 000000000000"
	.long 0
	.word 0, 24 + 5
	.long 0xfee00000, 0
	.byte 0, 0, 0x14, 3
	.long 0x600, 0x201, 0, 0
	.byte 1, 0
	.ascii "ISA   "
	.byte 2, 2, 0x11, 1
	.long 0xfec00000
	.set pin, 0
	.rept 24
	.byte 3, 0, 0, 0, 0, pin, 2, pin
	.set pin, pin + 1
	.endr
	.byte 4, 3, 0, 0, 0, 0, 0, 0
	.byte 4, 1, 0, 0, 0, 0, 0xff, 1
table_end:
#endif
