use super::{arbitrary::value, *};
use crate::{FromAgent, Reply, Request, ToAgent};
use alloc::{string::String, vec};
use core::fmt::Debug;
use proptest::prelude::*;

/// Feeds `stream` in pieces of the given lengths, in turn, and gives all messages up to the first error.
fn read<T: DeserializeOwned>(stream: &[u8], pieces: &[usize]) -> (Vec<T>, Result<(), FrameError>) {
    let mut decoder = Decoder::new();
    let mut messages = Vec::new();
    let mut rest = stream;
    let mut pieces = pieces.iter().cycle();
    while !rest.is_empty() {
        let (piece, later) = rest.split_at((*pieces.next().unwrap()).clamp(1, rest.len()));
        rest = later;
        decoder.push(piece);
        loop {
            match decoder.next() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(decoder.next::<T>().err(), Some(FrameError::Broken));
                    return (messages, Err(error));
                }
            }
        }
        assert!(decoder.bytes.len() <= HEADER_BYTES + MAX_MESSAGE_BYTES + piece.len());
    }
    (messages, Ok(()))
}

fn round_trip<T: Serialize + DeserializeOwned + PartialEq + Debug>(sources: &[Vec<u8>], pieces: &[usize]) {
    let messages: Vec<T> = sources.iter().map(|source| value(source)).collect();
    let stream: Vec<u8> = messages.iter().flat_map(|message| encode(message).unwrap()).collect();
    let (got, result) = read::<T>(&stream, pieces);
    assert_eq!(result, Ok(()));
    assert_eq!(got, messages);
}

fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..most)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn messages_survive_any_split(
        sources in prop::collection::vec(bytes(600), 1..6),
        pieces in prop::collection::vec(1..200usize, 1..8),
    ) {
        round_trip::<ToAgent>(&sources, &pieces);
        round_trip::<FromAgent>(&sources, &pieces);
    }

    #[test]
    fn hostile_streams_end_in_errors(stream in bytes(2000), pieces in prop::collection::vec(1..200usize, 1..8)) {
        let _ = read::<ToAgent>(&stream, &pieces);
        let _ = read::<FromAgent>(&stream, &pieces);
    }

    #[test]
    fn hostile_contents_end_in_errors(content in bytes(2000)) {
        let mut stream = u32::try_from(content.len()).unwrap().to_le_bytes().to_vec();
        stream.extend(&content);
        let _ = read::<ToAgent>(&stream, &[usize::MAX]);
        let _ = read::<FromAgent>(&stream, &[usize::MAX]);
    }

    #[test]
    fn damaged_frames_end_in_errors_or_other_messages(
        source in bytes(600), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut stream = encode(&value::<ToAgent>(&source)).unwrap();
        for (index, byte) in flips {
            let at = index.index(stream.len());
            stream[at] = byte;
        }
        let _ = read::<ToAgent>(&stream, &[7]);
    }
}

#[test]
fn the_frame_is_as_documented() {
    let frame = encode(&ToAgent { id: 5, request: Request::Hello { version: 1 } }).unwrap();
    assert_eq!(frame, [3, 0, 0, 0, 5, 0, 1]);
}

#[test]
fn long_messages_are_refused_on_both_sides() {
    let message = "x".repeat(MAX_MESSAGE_BYTES);
    assert!(matches!(encode(&message), Err(FrameError::TooLong(_))));
    assert!(encode(&"x".repeat(MAX_MESSAGE_BYTES - 3)).is_ok());
    let length = u32::try_from(MAX_MESSAGE_BYTES).unwrap() + 1;
    let (_, result) = read::<FromAgent>(&length.to_le_bytes(), &[1]);
    assert_eq!(result, Err(FrameError::TooLong(MAX_MESSAGE_BYTES + 1)));
}

#[test]
fn trailing_bytes_are_refused() {
    let mut frame = encode(&FromAgent::Reply { id: 1, result: Ok(Reply::Done) }).unwrap();
    frame.push(0);
    frame[0] += 1;
    assert_eq!(read::<FromAgent>(&frame, &[100]).1, Err(FrameError::Trailing(1)));
}

#[test]
fn announced_elements_are_not_allocated() {
    // A reply with 2^63 processes, of which none arrives.
    let mut content = vec![0, 1, 0, 3];
    content.extend([0xff; 8]);
    content.push(0x7f);
    let mut frame = u32::try_from(content.len()).unwrap().to_le_bytes().to_vec();
    frame.extend(content);
    assert!(matches!(read::<FromAgent>(&frame, &[100]).1, Err(FrameError::Garbage(_))));
}

#[test]
fn a_stream_may_end_between_frames_only() {
    let mut decoder = Decoder::new();
    assert!(decoder.is_between_frames());
    let frame = encode(&String::from("abc")).unwrap();
    decoder.push(&frame[..5]);
    assert_eq!(decoder.next::<String>(), Ok(None));
    assert!(!decoder.is_between_frames());
    decoder.push(&frame[5..]);
    assert_eq!(decoder.next::<String>(), Ok(Some(String::from("abc"))));
    assert!(decoder.is_between_frames());
}
