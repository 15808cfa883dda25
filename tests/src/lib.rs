//! The harness of the end-to-end tests: a `caisson` with a store and a run directory of its own, guests with deadlines, and images
//! made by Debian's own tools. Whatever a test does, its containers are gone when it ends.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a harness fails by panicking: its caller is a test")]

mod host;
pub mod images;
mod process;

pub use host::{Guest, Host};
pub use process::{Finished, finish, finish_with_input};
