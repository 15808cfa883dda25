#![allow(clippy::unwrap_used)]
use super::file::{FormatError, decode, encode};
use proptest::prelude::*;
use serde_json::{Value, json};

fn sample() -> Value {
    json!({"shape": {"memory_mib": 128}, "vcpus": [[1, 2, 3]], "identity": "kernel agent"})
}

fn read(bytes: &[u8]) -> Result<Value, FormatError> {
    decode(bytes)
}

#[test]
fn a_state_comes_back() {
    assert_eq!(read(&encode(&sample()).unwrap()).unwrap(), sample());
}

#[test]
fn errors_say_what_is_wrong() {
    let good = encode(&sample()).unwrap();
    assert!(matches!(read(b"#!/bin/sh"), Err(FormatError::Magic)));
    assert!(matches!(read(&[]), Err(FormatError::Length { found: 0, .. })));
    assert!(matches!(read(&good[..good.len() - 1]), Err(FormatError::Length { .. })));
    let mut newer = good.clone();
    newer[8] += 1;
    assert!(matches!(read(&newer), Err(FormatError::Version { found: 2 })));
    let mut damaged = good;
    *damaged.last_mut().unwrap() ^= 1;
    assert!(matches!(read(&damaged), Err(FormatError::Checksum)));
}

proptest! {
    #[test]
    fn no_changed_byte_goes_unnoticed(position in any::<prop::sample::Index>(), change in 1u8..) {
        let mut bytes = encode(&sample()).unwrap();
        let position = position.index(bytes.len());
        bytes[position] ^= change;
        prop_assert!(read(&bytes).is_err());
    }

    #[test]
    fn no_other_length_goes_unnoticed(cut in any::<prop::sample::Index>(), more in prop::collection::vec(any::<u8>(), 1..100)) {
        let bytes = encode(&sample()).unwrap();
        prop_assert!(read(&bytes[..cut.index(bytes.len())]).is_err());
        prop_assert!(read(&[bytes, more].concat()).is_err());
    }

    #[test]
    fn rubbish_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        prop_assert!(read(&bytes).is_err());
    }
}
