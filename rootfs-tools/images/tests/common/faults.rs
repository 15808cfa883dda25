//! A proxy between us and a registry, in this process, that spoils what it is told to spoil.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What becomes of a request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Nothing: it goes to the registry.
    None,
    /// The connection is closed without an answer.
    Close,
    /// A status, further header lines, and a body, in place of the registry's.
    Answer(u16, String, Vec<u8>),
    /// The registry's answer, cut after so many bytes of the body.
    Cut(usize),
    /// The registry's answer, with its body so changed, and its length made to fit.
    Body(fn(Vec<u8>) -> Vec<u8>),
    /// The registry's answer, without this header.
    Without(&'static str),
    /// The registry's answer, in pieces with a pause between.
    Slow,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

type Rule = dyn Fn(&Seen, usize) -> Fault + Send + Sync;

pub struct Proxy {
    pub port: u16,
    pub seen: Arc<Mutex<Vec<Seen>>>,
    stop: Arc<AtomicBool>,
}

impl Proxy {
    /// Forwards to `upstream` (a port of loopback's; 0: nowhere). `rule` is told the request, and how many of the same
    /// method and path came before.
    pub fn start(upstream: u16, rule: impl Fn(&Seen, usize) -> Fault + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let rule: Arc<Rule> = Arc::new(rule);
        let (of_thread, stopped) = (seen.clone(), stop.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (seen, rule) = (of_thread.clone(), rule.clone());
                std::thread::spawn(move || {
                    let _ = stream.and_then(|stream| serve(stream, upstream, &seen, &*rule));
                });
            }
        });
        Self { port, seen, stop }
    }

    pub fn host(&self) -> String {
        format!("localhost:{}", self.port)
    }

    pub fn count(&self, method: &str, part: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|seen| seen.method == method && seen.path.contains(part)).count()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn head(reader: &mut impl BufRead) -> io::Result<(String, Vec<(String, String)>)> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let first = line.trim_end().to_owned();
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some((key, value)) => headers.push((key.to_owned(), value.to_owned())),
            None => return Ok((first, headers)),
        }
    }
}

/// One request to a connection, which is enough.
fn serve(mut client: TcpStream, upstream: u16, seen: &Mutex<Vec<Seen>>, rule: &Rule) -> io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let (first, headers) = head(&mut reader)?;
    let mut words = first.split(' ');
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Ok(());
    };
    if !path.starts_with('/') {
        return Ok(()); // A TLS hello.
    }
    let request = Seen { method: method.to_owned(), path: path.to_owned(), headers };
    let before = {
        let mut seen = seen.lock().unwrap();
        let before = seen.iter().filter(|other| other.method == method && other.path == path).count();
        seen.push(request.clone());
        before
    };
    let length: u64 = request.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let fault = rule(&request, before);
    match fault {
        Fault::Close => return Ok(()),
        Fault::Answer(status, headers, body) => {
            io::copy(&mut reader.by_ref().take(length), &mut io::sink())?;
            let head = format!(
                "HTTP/1.1 {status} Fault\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            client.write_all(head.as_bytes())?;
            return client.write_all(&body);
        }
        _ => (),
    }
    let mut server = TcpStream::connect(("127.0.0.1", upstream))?;
    let mut text = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n");
    for (key, value) in &request.headers {
        if !key.eq_ignore_ascii_case("connection") {
            text.push_str(&format!("{key}: {value}\r\n"));
        }
    }
    server.write_all(format!("{text}\r\n").as_bytes())?;
    io::copy(&mut reader.by_ref().take(length), &mut server)?;
    let mut answer = BufReader::new(server);
    let (first, headers) = head(&mut answer)?;
    let mut body = Vec::new();
    if method != "HEAD" {
        answer.read_to_end(&mut body)?;
    }
    let declared =
        headers.iter().find(|(key, _)| key.eq_ignore_ascii_case("content-length")).map(|(_, value)| value.clone());
    let mut declared = declared.unwrap_or_else(|| body.len().to_string());
    if let Fault::Body(change) = fault {
        body = change(body);
        declared = body.len().to_string();
    }
    let mut text = format!("{first}\r\n");
    for (key, value) in &headers {
        let dropped = matches!(fault, Fault::Without(name) if key.eq_ignore_ascii_case(name));
        let own =
            ["content-length", "connection", "transfer-encoding"].iter().any(|name| key.eq_ignore_ascii_case(name));
        if !dropped && !own {
            text.push_str(&format!("{key}: {value}\r\n"));
        }
    }
    client.write_all(format!("{text}content-length: {declared}\r\nconnection: close\r\n\r\n").as_bytes())?;
    match fault {
        Fault::Cut(at) => client.write_all(&body[..at.min(body.len())]),
        Fault::Slow => {
            for piece in body.chunks((body.len() / 8).max(1)) {
                client.write_all(piece)?;
                client.flush()?;
                std::thread::sleep(Duration::from_millis(30));
            }
            Ok(())
        }
        _ => client.write_all(&body),
    }
}
