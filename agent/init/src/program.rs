//! Finding a container's program, as execvp(3) would.
use crate::error::{Result, error};
use alloc::{
    format,
    string::{String, ToString},
};
use caisson_agent_protocol::{AgentError, ErrorKind, Process};
use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, statat},
    io::Errno,
};

/// Where programs are looked for when the environment has no PATH: what runc takes.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The value of a variable: the last one wins, as it does for the program.
pub(crate) fn variable<'a>(environment: &'a [String], name: &str) -> Option<&'a str> {
    environment.iter().rev().find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
}

/// The path of a process's program in the container, which the calling process is in.
pub(crate) fn find(process: &Process) -> Result<String> {
    let program = process.args.first().filter(|program| !program.is_empty());
    let program =
        program.ok_or_else(|| error(ErrorKind::Invalid, "there is no program to run: its arguments are empty"))?;
    if program.contains('/') {
        let path = if program.starts_with('/') { program.clone() } else { format!("{}/{program}", process.cwd) };
        return match look(&path) {
            Ok(()) => Ok(path),
            Err(errno) => Err(failure(program, errno)),
        };
    }
    let mut refusal = Errno::NOENT;
    for directory in variable(&process.env, "PATH").unwrap_or(DEFAULT_PATH).split(':') {
        let path = match directory {
            "" => format!("{}/{program}", process.cwd),
            _ if directory.starts_with('/') => format!("{directory}/{program}"),
            _ => format!("{}/{directory}/{program}", process.cwd),
        };
        match look(&path) {
            Ok(()) => return Ok(path),
            // Something of that name is there: say so if nothing better comes.
            Err(Errno::ACCESS) => refusal = Errno::ACCESS,
            Err(_) => {}
        }
    }
    Err(failure(program, refusal))
}

/// Whether there is an executable file. Whether this user may execute it, execve(2) will say.
fn look(path: &str) -> rustix::io::Result<()> {
    let file = statat(CWD, path, AtFlags::empty())?;
    let executable = Mode::XUSR | Mode::XGRP | Mode::XOTH;
    match FileType::from_raw_mode(file.st_mode) {
        FileType::RegularFile if Mode::from_raw_mode(file.st_mode).intersects(executable) => Ok(()),
        _ => Err(Errno::ACCESS),
    }
}

/// Says that a program cannot be run. The words are those that callers of OCI runtimes look for.
pub(crate) fn failure(program: &str, errno: Errno) -> AgentError {
    let (kind, reason) = match errno {
        Errno::NOENT | Errno::NOTDIR if program.contains('/') => {
            (ErrorKind::ProgramNotFound, "no such file or directory".to_string())
        }
        Errno::NOENT | Errno::NOTDIR => (ErrorKind::ProgramNotFound, "executable file not found in $PATH".to_string()),
        Errno::ACCESS | Errno::PERM | Errno::NOEXEC | Errno::ISDIR | Errno::LOOP | Errno::TXTBSY => {
            (ErrorKind::ProgramNotExecutable, crate::error::describe(errno))
        }
        _ => (ErrorKind::System, crate::error::describe(errno)),
    };
    error(kind, format!("exec: {program:?}: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_variable_counts() {
        let environment = ["A=1", "PATHX=2", "A=3", "B="].map(String::from);
        assert_eq!(variable(&environment, "A"), Some("3"));
        assert_eq!(variable(&environment, "B"), Some(""));
        assert_eq!(variable(&environment, "PATH"), None);
    }

    #[test]
    fn programs_are_looked_for_in_the_path() {
        let directory = tempfile::tempdir().unwrap();
        let plain = directory.path().join("plain");
        std::fs::write(&plain, "").unwrap();
        let path = format!("PATH=/nonexistent:{}:/bin", directory.path().display());
        let process = |program: &str| Process {
            args: vec![program.to_string()],
            env: vec![path.clone()],
            cwd: directory.path().display().to_string(),
            ..crate::launch::tests::process()
        };
        assert_eq!(find(&process("sh")).unwrap(), "/bin/sh");
        assert_eq!(find(&process("/bin/sh")).unwrap(), "/bin/sh");
        assert_eq!(find(&process("plain")).unwrap_err().kind, ErrorKind::ProgramNotExecutable);
        assert_eq!(find(&process("./plain")).unwrap_err().kind, ErrorKind::ProgramNotExecutable);
        assert_eq!(find(&process("/tmp")).unwrap_err().kind, ErrorKind::ProgramNotExecutable);
        assert_eq!(find(&process("no-such-program")).unwrap_err().kind, ErrorKind::ProgramNotFound);
        assert_eq!(find(&process("/no-such-program")).unwrap_err().kind, ErrorKind::ProgramNotFound);
        assert_eq!(find(&process("")).unwrap_err().kind, ErrorKind::Invalid);
    }
}
