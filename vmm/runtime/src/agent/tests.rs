//! Against agents that run in this process: well-behaved, slow, dead and hostile ones.
use super::*;

const DEADLINE: Duration = Duration::from_secs(60);

/// An agent in a thread: it answers each request as `answer` says, with raw bytes.
fn fake(mut answer: impl FnMut(ToAgent) -> Vec<u8> + Send + 'static) -> UnixStream {
    let (host, mut guest) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let mut decoder = Decoder::new();
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = guest.read(&mut buffer) {
            decoder.push(&buffer[..count]);
            while let Some(message) = decoder.next::<ToAgent>().unwrap() {
                if guest.write_all(&answer(message)).is_err() {
                    return;
                }
            }
        }
    });
    host
}

fn reply(id: u32, result: Answer) -> Vec<u8> {
    encode(&FromAgent::Reply { id, result }).unwrap()
}

#[test]
fn requests_are_answered_and_events_arrive_in_order() {
    let (sender, receiver) = mpsc::channel();
    let stream = fake(|message| {
        let mut bytes = encode(&FromAgent::Event(Event::Oom { container: "a".into() })).unwrap();
        bytes.extend(reply(message.id, Ok(Reply::Hello { version: VERSION })));
        bytes
    });
    let agent = Agent::new(stream, move |event| sender.send(event).unwrap_or(())).unwrap();
    agent.hello(DEADLINE).unwrap();
    assert!(matches!(receiver.recv().unwrap(), AgentEvent::Event(Event::Oom { .. })));
    assert!(matches!(agent.done(Request::Prepare, DEADLINE), Err(RequestError::Answer { request: "Prepare" })));
    drop(agent);
    assert!(matches!(receiver.recv().unwrap(), AgentEvent::Event(Event::Oom { .. })));
    assert!(matches!(receiver.recv().unwrap(), AgentEvent::Ended(_)));
}

#[test]
fn a_refusal_keeps_its_kind_and_text() {
    let stream = fake(|message| {
        reply(message.id, Err(AgentError { kind: ErrorKind::ProgramNotFound, message: "no such program".into() }))
    });
    let agent = Agent::new(stream, |_| {}).unwrap();
    let error = agent.done(Request::Prepare, DEADLINE).unwrap_err();
    assert_eq!(error.kind(), Some(ErrorKind::ProgramNotFound));
    assert_eq!(error.to_string(), "no such program");
}

#[test]
fn a_silent_agent_meets_the_deadline_and_may_answer_later() {
    let mut first = None;
    let stream = fake(move |message| match first.take() {
        None => {
            first = Some(message.id);
            Vec::new()
        }
        Some(id) => [reply(id, Ok(Reply::Done)), reply(message.id, Ok(Reply::Done))].concat(),
    });
    let agent = Agent::new(stream, |_| {}).unwrap();
    assert!(matches!(agent.done(Request::Prepare, Duration::from_millis(1)), Err(RequestError::Deadline { .. })));
    agent.done(Request::Prepare, DEADLINE).unwrap();
}

#[test]
fn a_hostile_agent_ends_the_connection_and_every_request() {
    for garbage in [vec![0xff; 64], reply(77, Ok(Reply::Done))] {
        let (sender, receiver) = mpsc::channel();
        let stream = fake(move |_| garbage.clone());
        let agent = Agent::new(stream, move |event| sender.send(event).unwrap_or(())).unwrap();
        assert!(matches!(agent.done(Request::Prepare, DEADLINE), Err(RequestError::Ended { .. })));
        assert!(matches!(receiver.recv().unwrap(), AgentEvent::Ended(Some(_))));
        assert!(agent.done(Request::Prepare, DEADLINE).is_err());
    }
}
