//! The life of containers, with the agent in this process, a busybox root, and unix sockets in the place of vsock. It needs root.
#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used)]
use caisson_agent::server::{Machine, Server};
use caisson_agent_protocol::*;
use std::{
    collections::VecDeque,
    io::{Read, Write},
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    time::Duration,
};

/// Generous: the machine may be busy.
const DEADLINE: Duration = Duration::from_secs(100);

/// An agent and its only host.
struct Host {
    directory: tempfile::TempDir,
    control: UnixStream,
    decoder: Decoder,
    events: VecDeque<Event>,
    requests: u32,
    tokens: StreamToken,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        for name in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for applet in
            ["sh", "cat", "echo", "id", "sleep", "true", "hostname", "ls", "kill", "stat", "mount", "stty", "tty", "ps"]
        {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        std::fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/var/www:/bin/sh\n").unwrap();
        std::fs::write(root.join("etc/group"), "root:x:0:\nwww:x:34:\nstaff:x:50:web\n").unwrap();
        let listen = |name: &str| {
            let listener = UnixListener::bind(directory.path().join(name)).unwrap();
            listener.set_nonblocking(true).unwrap();
            OwnedFd::from(listener)
        };
        let (control, streams, shares) = (listen("control"), listen("streams"), directory.path().display().to_string());
        std::thread::spawn(move || {
            let machine = Machine::borrowed(shares).unwrap();
            Server::new(machine, control, streams).unwrap().run()
        });
        let control = UnixStream::connect(directory.path().join("control")).unwrap();
        let mut host =
            Self { directory, control, decoder: Decoder::new(), events: VecDeque::new(), requests: 0, tokens: 0 };
        assert_eq!(host.ask(Request::Hello { version: VERSION }), Ok(Reply::Hello { version: VERSION }));
        let sandbox = Sandbox { entropy: vec![1; 32], realtime_ns: 0, hostname: "sandbox".into() };
        assert_eq!(host.ask(Request::CreateSandbox(sandbox)), Ok(Reply::Done));
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn receive(&mut self) -> FromAgent {
        self.control.set_read_timeout(Some(DEADLINE)).unwrap();
        loop {
            if let Some(message) = self.decoder.next().unwrap() {
                return message;
            }
            let mut buffer = [0; 4096];
            let count = self.control.read(&mut buffer).expect("the agent answers in time");
            assert_ne!(count, 0, "the agent ended the connection");
            self.decoder.push(&buffer[..count]);
        }
    }

    fn ask(&mut self, request: Request) -> Result<Reply, AgentError> {
        self.requests += 1;
        let number = self.requests;
        self.control.write_all(&encode(&ToAgent { id: number, request }).unwrap()).unwrap();
        loop {
            match self.receive() {
                FromAgent::Reply { id, result } => {
                    assert_eq!(id, number);
                    return result;
                }
                FromAgent::Event(event) => self.events.push_back(event),
            }
        }
    }

    fn exit_of(&mut self, wanted: &str) -> ExitStatus {
        loop {
            let position =
                self.events.iter().position(|event| matches!(event, Event::Exit { process, .. } if process == wanted));
            if let Some(Event::Exit { status, .. }) = position.and_then(|position| self.events.remove(position)) {
                return status;
            }
            match self.receive() {
                FromAgent::Event(event) => self.events.push_back(event),
                FromAgent::Reply { .. } => panic!("a reply without a request"),
            }
        }
    }

    fn stream(&mut self) -> (StreamToken, UnixStream) {
        self.tokens += 1;
        let mut stream = UnixStream::connect(self.path("streams")).unwrap();
        stream.write_all(&self.tokens.to_le_bytes()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        (self.tokens, stream)
    }

    /// Creates and starts a container; gives its standard streams.
    fn start(&mut self, id: &str, container: Container) -> [UnixStream; 3] {
        let [stdin, stdout, stderr] = [(); 3].map(|()| self.stream());
        let stdio = Stdio { stdin: Some(stdin.0), stdout: Some(stdout.0), stderr: Some(stderr.0) };
        let container = Container { id: id.into(), stdio, ..container };
        assert_eq!(self.ask(Request::CreateContainer(Box::new(container))), Ok(Reply::Process { pid: 1 }));
        assert_eq!(self.ask(Request::Start { container: id.into() }), Ok(Reply::Done));
        [stdin.1, stdout.1, stderr.1]
    }

    fn exec(&mut self, container: &str, process: &str, script: &str) -> (Result<Reply, AgentError>, [UnixStream; 2]) {
        let [stdin, stdout] = [(); 2].map(|()| self.stream());
        let stdio = Stdio { stdin: Some(stdin.0), stdout: Some(stdout.0), stderr: None };
        let spec = Box::new(process_of(&["sh", "-c", script]));
        let request = Request::Exec { container: container.into(), process: process.into(), spec, stdio };
        (self.ask(request), [stdin.1, stdout.1])
    }

    /// Runs a program to its end: its output, its errors and how it ended.
    fn run(&mut self, container: Container) -> (String, String, ExitStatus) {
        let [stdin, stdout, stderr] = self.start("run", container);
        drop(stdin);
        let (stdout, stderr) = (read(stdout), read(stderr));
        let status = self.exit_of("");
        assert_eq!(self.ask(Request::Remove { container: "run".into() }), Ok(Reply::Done));
        (stdout, stderr, status)
    }
}

fn read(mut stream: UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn read_until(stream: &mut UnixStream, end: &str) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(end.as_bytes()) {
        stream.read_exact(&mut byte).unwrap();
        text.push(byte[0]);
    }
    String::from_utf8(text).unwrap()
}

/// What docker gives: the machine that the test runs on may lack others.
const ALL: u64 = 0xa804_25fb;

fn process_of(args: &[&str]) -> Process {
    Process {
        args: args.iter().map(ToString::to_string).collect(),
        env: vec!["PATH=/bin".into()],
        cwd: "/".into(),
        user: User::Name(String::new()),
        capabilities: Capabilities { bounding: ALL, effective: ALL, inheritable: 0, permitted: ALL, ambient: 0 },
        no_new_privileges: true,
        rlimits: Vec::new(),
        oom_score_adj: None,
        terminal: None,
        seccomp: Vec::new(),
        scheduler: None,
        io_priority: None,
        personality: None,
    }
}

fn mount(fs_type: &str, destination: &str, data: &str) -> Mount {
    Mount {
        destination: destination.into(),
        source: MountSource::Kernel { fs_type: fs_type.into() },
        flags: 0,
        propagation: Vec::new(),
        data: data.into(),
    }
}

fn container(process: Process) -> Container {
    Container {
        id: String::new(),
        root: Root::Share { tag: "root".into(), path: String::new(), readonly: false },
        hostname: "inside".into(),
        domainname: None,
        mounts: vec![
            mount("proc", "/proc", ""),
            mount("tmpfs", "/dev", "mode=755"),
            mount("devpts", "/dev/pts", "newinstance,ptmxmode=0666,mode=0620"),
            mount("tmpfs", "/dev/shm", "mode=1777"),
        ],
        root_propagation: String::new(),
        devices: Vec::new(),
        masked_paths: Vec::new(),
        readonly_paths: Vec::new(),
        sysctl: Vec::new(),
        files: Vec::new(),
        resources: Resources::default(),
        process: Some(process),
        stdio: Stdio::default(),
        own_network: true,
        own_cgroup_namespace: false,
    }
}

fn shell(script: &str) -> Container {
    container(process_of(&["sh", "-c", script]))
}

#[test]
fn programs_run_in_their_container() {
    let mut host = Host::new();
    let [mut stdin, stdout, stderr] =
        host.start("c", shell("echo $$; hostname; cat; echo oops >&2; echo $HOME; exit 7"));
    stdin.write_all(b"from the host\n").unwrap();
    stdin.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(read(stdout), "1\ninside\nfrom the host\n/root\n");
    assert_eq!(read(stderr), "oops\n");
    assert_eq!(host.exit_of(""), ExitStatus::Code(7));
    let again = host.ask(Request::Start { container: "c".into() });
    assert_eq!(again.unwrap_err().kind, ErrorKind::State);
    assert_eq!(host.ask(Request::Remove { container: "c".into() }), Ok(Reply::Done));
    let gone = host.ask(Request::Remove { container: "c".into() });
    assert_eq!(gone.unwrap_err().kind, ErrorKind::NotFound);
}

#[test]
fn containers_are_set_up_as_asked() {
    let mut host = Host::new();
    std::fs::create_dir(host.path("share")).unwrap();
    std::fs::write(host.path("share/file"), "shared\n").unwrap();
    let mut wanted = shell(
        "cat /etc/hosts /etc/plain /data/file /link/made/mark; id -u; id -g; id -G; stat -c %a,%t,%T /dev/null; \
         stat -c %a /dev/mine; echo x > /proc/sys/kernel/hostname || echo ro; cat /proc/sys/kernel/domainname; \
         ls /masked; echo no > /data/file || echo ro; cd /; echo $PWD; umask; echo end",
    );
    let bind =
        |path: &str, content: &str, bind| FileToWrite { path: path.into(), content: content.into(), mode: 0o644, bind };
    std::os::unix::fs::symlink("/target", host.path("root/link")).unwrap();
    std::fs::create_dir_all(host.path("root/target")).unwrap();
    std::fs::create_dir_all(host.path("root/masked/secret")).unwrap();
    wanted.files = vec![
        bind("/etc/hosts", "bound\n", true),
        bind("/etc/plain", "written\n", false),
        bind("/link/made/mark", "mark\n", false),
    ];
    wanted.mounts.push(Mount {
        destination: "/data".into(),
        source: MountSource::Share { tag: "share".into(), path: String::new() },
        flags: 1,
        propagation: Vec::new(),
        data: String::new(),
    });
    wanted.devices.push(DeviceNode { path: "/dev/mine".into(), device: Device::Fifo, mode: 0o640, uid: 0, gid: 0 });
    wanted.masked_paths = vec!["/masked".into(), "/nothing".into()];
    wanted.readonly_paths = vec!["/proc/sys".into()];
    wanted.domainname = Some("domain".into());
    let process = wanted.process.as_mut().unwrap();
    process.user = User::Name("web".into());
    process.capabilities = Capabilities::default();
    process.cwd = "/made/for/it".into();
    let (stdout, _, status) = host.run(wanted);
    assert_eq!(status, ExitStatus::Code(0));
    let expected = "bound\nwritten\nshared\nmark\n33\n34\n34 50\n";
    assert!(stdout.starts_with(expected), "{stdout}");
    assert!(stdout.ends_with("640\nro\ndomain\nro\n/\n0022\nend\n"), "{stdout}");
    assert!(host.path("root/target/made/mark").is_file());
    assert!(host.path("root/made/for/it").is_dir());
}

#[test]
fn what_cannot_be_run_is_told_at_create_or_start() {
    let mut host = Host::new();
    let create = |host: &mut Host, args: &[&str]| {
        let container = Container { id: "c".into(), ..container(process_of(args)) };
        host.ask(Request::CreateContainer(Box::new(container))).unwrap_err()
    };
    let failure = create(&mut host, &["no-such-program"]);
    assert_eq!(failure.kind, ErrorKind::ProgramNotFound);
    assert_eq!(failure.message, r#"exec: "no-such-program": executable file not found in $PATH"#);
    assert_eq!(create(&mut host, &["/etc/passwd"]).kind, ErrorKind::ProgramNotExecutable);
    assert_eq!(create(&mut host, &[]).kind, ErrorKind::Invalid);
    std::fs::write(host.path("root/bin/garbage"), "\x7fgarbage").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(host.path("root/bin/garbage"), mode).unwrap();
    let garbage = Container { id: "c".into(), ..container(process_of(&["garbage"])) };
    assert!(host.ask(Request::CreateContainer(Box::new(garbage))).is_ok());
    let failure = host.ask(Request::Start { container: "c".into() }).unwrap_err();
    assert_eq!(failure.kind, ErrorKind::ProgramNotExecutable, "{}", failure.message);
    assert_eq!(host.ask(Request::Remove { container: "c".into() }), Ok(Reply::Done));
    let (stdout, ..) = host.run(shell("echo still here"));
    assert_eq!(stdout, "still here\n");
}

#[test]
fn signals_and_execs_reach_a_running_container() {
    let mut host = Host::new();
    let [_stdin, mut stdout, _stderr] =
        host.start("c", shell("trap 'echo got it; exit 3' TERM; echo ready; while :; do sleep 0.05; done"));
    read_until(&mut stdout, "ready\n");
    let (reply, [stdin, output]) = host.exec("c", "one", "hostname; cat; exit 4");
    assert!(matches!(reply, Ok(Reply::Process { pid: 2.. })), "{reply:?}");
    drop(stdin);
    assert_eq!(read(output), "inside\n");
    assert_eq!(host.exit_of("one"), ExitStatus::Code(4));
    // Its output is not waited for that a process in the background holds.
    let (reply, [_stdin, _output]) = host.exec("c", "two", "sleep 1000 & exit 5");
    assert!(reply.is_ok(), "{reply:?}");
    assert_eq!(host.exit_of("two"), ExitStatus::Code(5));
    let (reply, [_stdin, output]) = host.exec("c", "three", "kill -9 $$");
    assert!(reply.is_ok(), "{reply:?}");
    assert_eq!(read(output), "");
    assert_eq!(host.exit_of("three"), ExitStatus::Signal(9));
    let (reply, _) = host.exec("c", "four", "sleep 1000");
    assert!(reply.is_ok(), "{reply:?}");
    let signal =
        |process: &str, signal| Request::Signal { container: "c".into(), process: process.into(), signal, all: false };
    assert_eq!(host.ask(signal("five", 15)).unwrap_err().kind, ErrorKind::NotFound);
    assert_eq!(host.ask(signal("", 15)), Ok(Reply::Done));
    assert_eq!(read(stdout), "got it\n");
    assert_eq!(host.exit_of(""), ExitStatus::Code(3));
    // It ended with init, and before init's end was told.
    assert!(
        host.events.iter().any(
            |event| matches!(event, Event::Exit { process, status: ExitStatus::Signal(9), .. } if process == "four")
        )
    );
    assert!(host.exec("c", "six", "true").0.is_err());
    assert_eq!(host.ask(Request::Remove { container: "c".into() }), Ok(Reply::Done));
}

#[test]
fn terminals_work() {
    let mut host = Host::new();
    let (token, mut terminal) = host.stream();
    let mut wanted = shell("tty; stty size; stat -c %F /dev/console; read line; echo got $line; stty size");
    wanted.process.as_mut().unwrap().terminal = Some(TerminalSize { width: 91, height: 17 });
    let stdio = Stdio { stdin: Some(token), ..Stdio::default() };
    let container = Container { id: "c".into(), stdio, ..wanted };
    assert_eq!(host.ask(Request::CreateContainer(Box::new(container))), Ok(Reply::Process { pid: 1 }));
    assert_eq!(host.ask(Request::Start { container: "c".into() }), Ok(Reply::Done));
    assert_eq!(read_until(&mut terminal, "file\r\n"), "/dev/pts/0\r\n17 91\r\ncharacter special file\r\n");
    let size = TerminalSize { width: 100, height: 50 };
    let resize = Request::Resize { container: "c".into(), process: ProcessId::new(), size };
    assert_eq!(host.ask(resize), Ok(Reply::Done));
    terminal.write_all(b"hello\n").unwrap();
    assert_eq!(read(terminal), "hello\r\ngot hello\r\n50 100\r\n");
    assert_eq!(host.exit_of(""), ExitStatus::Code(0));
    assert_eq!(host.ask(Request::Remove { container: "c".into() }), Ok(Reply::Done));
}

#[test]
fn a_new_host_takes_the_old_ones_place() {
    let mut host = Host::new();
    let [_stdin, stdout, _stderr] = host.start("c", shell("cat; exit 9"));
    let control = UnixStream::connect(host.path("control")).unwrap();
    let old = std::mem::replace(&mut host.control, control);
    host.decoder = Decoder::new();
    assert_eq!(host.ask(Request::Hello { version: VERSION }), Ok(Reply::Hello { version: VERSION }));
    drop(old);
    drop(_stdin);
    assert_eq!(read(stdout), "");
    assert_eq!(host.exit_of(""), ExitStatus::Code(9));
    let (stdout, ..) = host.run(shell("echo again"));
    assert_eq!(stdout, "again\n");
}

#[test]
fn requests_out_of_order_are_refused() {
    let mut host = Host::new();
    let hello = host.ask(Request::Hello { version: VERSION + 1 });
    assert_eq!(hello.unwrap_err().kind, ErrorKind::Version);
    let missing = || "none".to_string();
    for request in [
        Request::Start { container: missing() },
        Request::Stats { container: missing() },
        Request::Pause { container: missing() },
    ] {
        assert_eq!(host.ask(request).unwrap_err().kind, ErrorKind::NotFound);
    }
    host.control = UnixStream::connect(host.path("control")).unwrap();
    let before_hello = host.ask(Request::Processes { container: missing() });
    assert_eq!(before_hello.unwrap_err().kind, ErrorKind::State);
}

#[test]
fn a_prepared_container_is_like_any_other() {
    let mut host = Host::new();
    let sample = || {
        let mut sample = shell(
            "id -u; hostname; cat; cat /link/x; echo no > /proc/sys/kernel/hostname || echo ro; stat -c %a /dev/shm",
        );
        sample.readonly_paths = vec!["/proc/sys".into()];
        sample.masked_paths = vec!["/proc/kcore".into()];
        sample
    };
    assert_eq!(host.ask(Request::PrepareContainer(Box::new(sample()))), Ok(Reply::Done));
    // One that is not like it, then one that is, then another one.
    for number in 0..3 {
        let mut wanted = sample();
        if number == 0 {
            wanted.masked_paths.clear();
        }
        wanted.hostname = format!("h{number}");
        wanted.process.as_mut().unwrap().user = User::Name("web".into());
        wanted.process.as_mut().unwrap().capabilities = Capabilities::default();
        wanted.files.push(FileToWrite { path: "/link/x".into(), content: "file\n".into(), mode: 0o644, bind: true });
        let [mut stdin, stdout, _stderr] = host.start("c", wanted);
        stdin.write_all(b"input\n").unwrap();
        drop(stdin);
        assert_eq!(read(stdout), format!("33\nh{number}\ninput\nfile\nro\n1777\n"));
        assert_eq!(host.exit_of(""), ExitStatus::Code(0));
        assert_eq!(host.ask(Request::Remove { container: "c".into() }), Ok(Reply::Done));
    }
    let mut unfit = sample();
    unfit.masked_paths.push("/etc/passwd".into());
    assert_eq!(host.ask(Request::PrepareContainer(Box::new(unfit))).unwrap_err().kind, ErrorKind::Invalid);
}
