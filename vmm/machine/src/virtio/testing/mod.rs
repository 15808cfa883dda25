//! The driver's side of a device, for tests: what Linux's virtio-mmio does, and what it never would.
#![allow(clippy::unwrap_used, dead_code)]

mod conformance;
mod driver;

pub(crate) use conformance::*;
pub(crate) use driver::{Desc, Driver, SECOND_REGION};
