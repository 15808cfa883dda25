//! The devices of a PC that remain: a serial port for early messages, and the keyboard controller's reset line.

pub mod reset;
pub mod serial;
