//! Debian's `docker-registry`, on a port that was free.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A running registry; killed when it is dropped.
pub struct Registry {
    child: Child,
    pub port: u16,
}

/// What it asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Open,
    /// User `user`, password `secret`.
    Password,
    /// TLS for `localhost`, by the authority that [`authority`] makes in the same directory.
    Tls,
}

impl Registry {
    pub fn start(directory: &Path, kind: Kind) -> Self {
        // Another process may take the port between our look and the registry's: then it ends, and we try again.
        for attempt in 0..20 {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            drop(listener);
            let directory = directory.join(format!("registry-{attempt}"));
            std::fs::create_dir_all(&directory).unwrap();
            let mark = format!("{}-{port}-{attempt}", std::process::id());
            let mut config = format!(
                "version: 0.1\nlog: {{ level: error, accesslog: {{ disabled: true }} }}\nstorage:\n  filesystem: {{ rootdirectory: {} }}\n  delete: {{ enabled: true }}\nhttp:\n  addr: 127.0.0.1:{port}\n  secret: test\n  headers: {{ X-Mark: [\"{mark}\"] }}\n",
                directory.join("data").display()
            );
            match kind {
                Kind::Open => (),
                Kind::Password => {
                    let file = directory.join("htpasswd");
                    super::run("htpasswd", &["-Bbc", file.to_str().unwrap(), "user", "secret"]);
                    config.push_str(&format!("auth:\n  htpasswd: {{ realm: test, path: {} }}\n", file.display()));
                }
                Kind::Tls => {
                    let parent = directory.parent().unwrap();
                    config.push_str(&format!(
                        "  tls: {{ certificate: {}, key: {} }}\n",
                        parent.join("server.crt").display(),
                        parent.join("server.key").display()
                    ));
                }
            }
            let path = directory.join("config.yml");
            std::fs::write(&path, config).unwrap();
            let log = std::fs::File::create(directory.join("log")).unwrap();
            let mut child = Command::new("docker-registry")
                .args(["serve", path.to_str().unwrap()])
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .env_remove("HTTP_PROXY")
                .spawn()
                .expect("docker-registry (see .ci/run for the packages)");
            let deadline = Instant::now() + Duration::from_secs(120);
            while child.try_wait().unwrap().is_none() {
                assert!(Instant::now() < deadline, "the registry does not answer");
                let ready = match kind {
                    Kind::Tls => tls_answers(port).contains(&mark),
                    _ => answers(port).is_some_and(|answer| answer.contains(&mark)),
                };
                if ready {
                    return Self { child, port };
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        panic!("docker-registry does not start: see its log in {}", directory.display());
    }

    pub fn host(&self) -> String {
        format!("localhost:{}", self.port)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn answers(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    stream.write_all(b"GET /v2/ HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// openssl does not check the certificate if it is not asked to.
fn tls_answers(port: u16) -> String {
    let mut child = Command::new("openssl")
        .args(["s_client", "-quiet", "-connect", &format!("127.0.0.1:{port}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Where nobody listens yet, it has ended already.
    let _ = child.stdin.take().unwrap().write_all(b"GET /v2/ HTTP/1.0\r\n\r\n");
    String::from_utf8_lossy(&child.wait_with_output().unwrap().stdout).into_owned()
}

/// Makes an authority (`ca.crt`) and a certificate for `localhost` (`server.crt`, `server.key`).
pub fn authority(directory: &Path) {
    let at = |name: &str| directory.join(name).display().to_string();
    std::fs::write(at("ext"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n").unwrap();
    super::run(
        "openssl",
        &[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "30",
            "-subj",
            "/CN=Test authority",
            "-addext",
            "keyUsage=critical,keyCertSign",
            "-keyout",
            &at("ca.key"),
            "-out",
            &at("ca.crt"),
        ],
    );
    super::run(
        "openssl",
        &[
            "req",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-subj",
            "/CN=localhost",
            "-keyout",
            &at("server.key"),
            "-out",
            &at("server.csr"),
        ],
    );
    super::run(
        "openssl",
        &[
            "x509",
            "-req",
            "-in",
            &at("server.csr"),
            "-CA",
            &at("ca.crt"),
            "-CAkey",
            &at("ca.key"),
            "-CAcreateserial",
            "-days",
            "30",
            "-extfile",
            &at("ext"),
            "-out",
            &at("server.crt"),
        ],
    );
}
