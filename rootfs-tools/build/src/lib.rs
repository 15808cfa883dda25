//! Dockerfile to image; RUN steps execute in a guest.
pub mod dockerfile;
pub mod layer;
pub mod tree;
