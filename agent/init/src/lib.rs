//! PID 1 of every guest: it makes the machine a sandbox, sets up containers in it, and serves the host.
//!
//! One thread and one epoll instance ([`server`]). A container's processes are made by clone3(2) as children that share the agent's
//! memory until they execute their program ([`child`]): copying page tables is what a new process costs in a guest whose kernel is
//! emulated, and a system call costs 0.3 ms there, which explains more than one choice in here.
//!
//! The library is the agent; `main.rs` gives it what a program needs that has no libc. Under `cargo test` it is an ordinary library.
#![cfg_attr(not(test), no_std)]
extern crate alloc;

pub mod boot;
mod cgroup;
mod child;
mod container;
mod control;
mod device_filter;
mod error;
pub mod heap;
mod identity;
mod launch;
mod network;
mod processes;
mod program;
mod pump;
mod root;
mod sandbox;
pub mod server;
mod slab;
mod streams;
pub mod sys;
