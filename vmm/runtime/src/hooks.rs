//! OCI hooks of the host: programs that are run at moments of a container's life, with its state on standard input.
use std::{
    io::{self, Write},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use oci_spec::runtime::Hook;
use serde_json::Value;

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It cannot be run.
    #[error("cannot run the {moment} hook {path}")]
    Run {
        /// When.
        moment: &'static str,
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It failed.
    #[error("the {moment} hook {path} failed ({status}): {stderr}")]
    Failed {
        /// When.
        moment: &'static str,
        /// Its path.
        path: String,
        /// How.
        status: String,
        /// What it said.
        stderr: String,
    },
}

/// Runs hooks in their order until one fails.
pub fn run(moment: &'static str, hooks: Option<&Vec<Hook>>, state: &Value) -> Result<(), HookError> {
    hooks.into_iter().flatten().try_for_each(|hook| run_one(moment, hook, state))
}

fn run_one(moment: &'static str, hook: &Hook, state: &Value) -> Result<(), HookError> {
    let path = hook.path().display().to_string();
    let failed = |source| HookError::Run { moment, path: path.clone(), source };
    let mut command = Command::new(hook.path());
    let args = hook.args().clone().unwrap_or_default();
    if let Some((name, rest)) = args.split_first() {
        command.arg0(name).args(rest);
    }
    command.env_clear();
    for variable in hook.env().iter().flatten() {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        command.env(name, value);
    }
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(failed)?;
    if let Some(mut input) = child.stdin.take() {
        // One that does not care closes it.
        let _ = input.write_all(state.to_string().as_bytes());
    }
    let deadline = hook
        .timeout()
        .filter(|seconds| *seconds > 0)
        .map(|seconds| Instant::now() + Duration::from_secs(seconds.unsigned_abs()));
    if let Some(deadline) = deadline {
        while child.try_wait().map_err(failed)?.is_none() {
            if Instant::now() >= deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(HookError::Failed {
                    moment,
                    path,
                    status: "its timeout passed".into(),
                    stderr: String::new(),
                });
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(HookError::Failed { moment, path, status: output.status.to_string(), stderr })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_gets_the_state_its_arguments_and_only_its_environment() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let script = format!("cat > {0}; echo $0 $1 $A $HOME >> {0}", out.display());
        let hook: Hook = serde_json::from_value(
            serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script, "name", "one"], "env": ["A=b"]}),
        )
        .unwrap();
        run("createRuntime", Some(&vec![hook]), &serde_json::json!({"id": "x"})).unwrap();
        assert_eq!(std::fs::read_to_string(out).unwrap(), "{\"id\":\"x\"}name one b\n");
    }

    #[test]
    fn failures_and_timeouts_are_told() {
        let hook = |value| vec![serde_json::from_value::<Hook>(value).unwrap()];
        let state = serde_json::json!({});
        let error = run(
            "poststart",
            Some(&hook(serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", "echo no >&2; exit 3"]}))),
            &state,
        )
        .unwrap_err();
        assert!(error.to_string().contains("poststart") && error.to_string().contains("no"), "{error}");
        assert!(run("poststart", Some(&hook(serde_json::json!({"path": "/nonexistent"}))), &state).is_err());
        let slow = hook(serde_json::json!({"path": "/bin/sleep", "args": ["sleep", "600"], "timeout": 1}));
        assert!(run("prestart", Some(&slow), &state).unwrap_err().to_string().contains("timeout"));
        run("poststop", None, &state).unwrap();
    }
}
