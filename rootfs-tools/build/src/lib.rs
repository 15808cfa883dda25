//! Dockerfile to image; RUN steps execute in a guest.
pub mod context;
pub mod copy;
pub mod dockerfile;
pub mod layer;
pub mod pattern;
pub mod tree;
pub mod users;
