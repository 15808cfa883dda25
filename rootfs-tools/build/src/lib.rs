//! Dockerfile to image; RUN steps execute in a guest.
//!
//! [`dockerfile`] parses, [`plan`] finds out which stages are needed and in which order, [`builder`] builds them: COPY, ADD
//! and WORKDIR become layers on the host, straight from the [`context`] and from views of other layers ([`tree`],
//! [`views`]); RUN goes to a [`guest`], whose writable disk is read by [`ext4`]. What a step makes is remembered in the
//! [`cache`] by what went into it.
pub mod builder;
pub mod cache;
pub mod config;
pub mod context;
pub mod copy;
pub mod dockerfile;
pub mod ext4;
pub mod guest;
pub mod layer;
pub mod pattern;
pub mod plan;
pub mod progress;
mod run;
mod stage;
pub mod tree;
pub mod users;
pub mod views;

pub use builder::{BuildError, Builder, Images, Options, StepError};
pub use stage::needs_guest;
