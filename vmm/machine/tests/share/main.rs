//! The file server, as a process of its own: behind the host's own FUSE client, compared with the file system below, and
//! under a hostile client.
#![allow(clippy::unwrap_used, unsafe_code)]
mod bridge;
mod hostile;
mod same;
