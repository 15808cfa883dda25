//! The caisson command.
fn main() {}
