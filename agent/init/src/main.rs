//! The agent's program: PID 1 of a guest, or of nothing. It has no libc and no standard library under it, so this file gives what
//! those would: the entry point, the memory allocator and the answer to a panic.
//!
//! `cargo build -p caisson-agent --profile agent --features freestanding --bin caisson-agent` makes it; `build.rs` says how it is linked.
#![no_std]
#![no_main]
#![allow(unsafe_code)] // Entry point and symbols that the compiler expects.

extern crate alloc;

mod memory;

use caisson_agent::{boot, heap, sys};

#[global_allocator]
static HEAP: heap::Heap = heap::Heap::new();

// The kernel enters with a stack that is aligned and zero registers; arguments and environment are of no interest.
core::arch::global_asm!(
    ".globl _start",
    "_start:",
    "xor %ebp, %ebp",
    "and $-16, %rsp",
    "call {start}",
    "ud2",
    start = sym start,
    options(att_syntax)
);

extern "C" fn start() -> ! {
    boot::run()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    boot::log(&alloc::format!("caisson-agent: {info}"));
    sys::end_machine()
}

/// The prebuilt `core` refers to it in its unwind tables; nothing here unwinds.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As [`rust_eh_personality`].
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    sys::end_machine()
}
