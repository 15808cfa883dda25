//! An image's configuration while it is built (OCI image specification, config.md), kept as JSON so that what is unknown
//! here survives, with docker's additions: `Healthcheck`, `OnBuild`, `Shell`.
use crate::dockerfile::{Command, Healthcheck};
use serde_json::{Map, Value, json};

/// The search path of images that set none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The shell of images that name none.
const DEFAULT_SHELL: [&str; 2] = ["/bin/sh", "-c"];
/// Most ports that one EXPOSE may name.
const MAX_PORTS: usize = 65_536;

/// A configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    whole: Map<String, Value>,
}

impl Config {
    /// That of `scratch`.
    pub fn scratch() -> Self {
        let Value::Object(whole) = json!({ "architecture": "amd64", "os": "linux", "config": {}, "history": [] })
        else {
            return Self { whole: Map::new() };
        };
        let mut config = Self { whole };
        config.set_env("PATH", DEFAULT_PATH);
        config
    }

    /// That of a base image. None: it is no JSON object.
    pub fn parse(json: &[u8]) -> Option<Self> {
        let Ok(Value::Object(mut whole)) = serde_json::from_slice(json) else { return None };
        if !whole.get("config").is_some_and(Value::is_object) {
            whole.insert("config".to_owned(), json!({}));
        }
        if !whole.get("history").is_some_and(Value::is_array) {
            whole.insert("history".to_owned(), json!([]));
        }
        // The layers are the builder's business; the rest was about the base image's own making.
        for key in ["rootfs", "container", "container_config", "docker_version", "id", "parent"] {
            whole.remove(key);
        }
        let mut config = Self { whole };
        if config.env("PATH").is_none() {
            config.set_env("PATH", DEFAULT_PATH);
        }
        Some(config)
    }

    /// The JSON.
    pub fn json(&self) -> Value {
        Value::Object(self.whole.clone())
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.whole.get("config")?.get(key)
    }

    fn set(&mut self, key: &str, value: Value) {
        if let Some(Value::Object(config)) = self.whole.get_mut("config") {
            match value {
                Value::Null => {
                    config.remove(key);
                }
                value => {
                    config.insert(key.to_owned(), value);
                }
            }
        }
    }

    fn strings(&self, key: &str) -> Vec<String> {
        let list = self.get(key).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    fn string(&self, key: &str) -> &str {
        self.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    fn set_member(&mut self, key: &str, name: &str, value: Value) {
        let mut members = match self.get(key) {
            Some(Value::Object(members)) => members.clone(),
            _ => Map::new(),
        };
        members.insert(name.to_owned(), value);
        self.set(key, Value::Object(members));
    }

    /// The environment, as `NAME=value`.
    pub fn environment(&self) -> Vec<String> {
        self.strings("Env")
    }

    /// A variable of it.
    pub fn env(&self, name: &str) -> Option<String> {
        self.environment()
            .iter()
            .find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name).map(|(_, value)| value.to_owned()))
    }

    /// Sets a variable, in its place if it has one.
    pub fn set_env(&mut self, name: &str, value: &str) {
        let mut all = self.environment();
        let pair = format!("{name}={value}");
        match all.iter_mut().find(|old| old.split_once('=').is_some_and(|(key, _)| key == name)) {
            Some(old) => *old = pair,
            None => all.push(pair),
        }
        self.set("Env", json!(all));
    }

    /// The working directory; empty if none is set.
    pub fn workdir(&self) -> &str {
        self.string("WorkingDir")
    }

    /// Sets it.
    pub fn set_workdir(&mut self, path: &str) {
        self.set("WorkingDir", json!(path));
    }

    /// The user; empty means root.
    pub fn user(&self) -> &str {
        self.string("User")
    }

    /// Sets it.
    pub fn set_user(&mut self, user: &str) {
        self.set("User", json!(user));
    }

    /// The shell of the shell form.
    pub fn shell(&self) -> Vec<String> {
        match self.strings("Shell") {
            shell if shell.is_empty() => DEFAULT_SHELL.map(str::to_owned).to_vec(),
            shell => shell,
        }
    }

    /// Sets it.
    pub fn set_shell(&mut self, shell: &[String]) {
        self.set("Shell", json!(shell));
    }

    /// The arguments that a command runs with.
    pub fn arguments(&self, command: &Command) -> Vec<String> {
        match command {
            Command::Exec(arguments) => arguments.clone(),
            Command::Shell(line) => {
                let mut arguments = self.shell();
                arguments.push(line.clone());
                arguments
            }
        }
    }

    /// CMD.
    pub fn set_cmd(&mut self, command: &Command) {
        self.set("Cmd", json!(self.arguments(command)));
    }

    /// ENTRYPOINT. A command that the base image set goes with its entrypoint; one of this Dockerfile stays.
    pub fn set_entrypoint(&mut self, command: &Command, keep_cmd: bool) {
        self.set("Entrypoint", json!(self.arguments(command)));
        if !keep_cmd {
            self.set("Cmd", Value::Null);
        }
    }

    /// LABEL.
    pub fn set_label(&mut self, name: &str, value: &str) {
        self.set_member("Labels", name, json!(value));
    }

    /// VOLUME.
    pub fn add_volume(&mut self, path: &str) {
        self.set_member("Volumes", path, json!({}));
    }

    /// EXPOSE: `80`, `80/udp`, `8000-8010`.
    pub fn expose(&mut self, text: &str) -> Result<(), String> {
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = protocol.to_ascii_lowercase();
        if !["tcp", "udp", "sctp"].contains(&protocol.as_str()) {
            return Err(format!("{text:?}: the protocol is tcp, udp or sctp, not {protocol:?}"));
        }
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let number = |text: &str| text.parse::<u16>().map_err(|_| format!("{text:?} is not a port from 0 to 65535"));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!("{ports:?} ends before it begins"));
        }
        for port in (first..=last).take(MAX_PORTS) {
            self.set_member("ExposedPorts", &format!("{port}/{protocol}"), json!({}));
        }
        Ok(())
    }

    /// STOPSIGNAL.
    pub fn set_stop_signal(&mut self, signal: &str) {
        self.set("StopSignal", json!(signal));
    }

    /// HEALTHCHECK.
    pub fn set_healthcheck(&mut self, check: &Healthcheck) {
        let test = match &check.command {
            None => vec!["NONE".to_owned()],
            Some(Command::Exec(arguments)) => {
                std::iter::once("CMD".to_owned()).chain(arguments.iter().cloned()).collect()
            }
            Some(Command::Shell(line)) => vec!["CMD-SHELL".to_owned(), line.clone()],
        };
        let mut value = Map::new();
        value.insert("Test".to_owned(), json!(test));
        for (key, time) in [
            ("Interval", check.interval_ns),
            ("Timeout", check.timeout_ns),
            ("StartPeriod", check.start_period_ns),
            ("StartInterval", check.start_interval_ns),
            ("Retries", check.retries.map(u64::from)),
        ] {
            if let Some(time) = time {
                value.insert(key.to_owned(), json!(time));
            }
        }
        self.set("Healthcheck", Value::Object(value));
    }

    /// ONBUILD.
    pub fn add_trigger(&mut self, text: &str) {
        let mut triggers = self.strings("OnBuild");
        triggers.push(text.to_owned());
        self.set("OnBuild", json!(triggers));
    }

    /// Takes the triggers that a base image has.
    pub fn take_triggers(&mut self) -> Vec<String> {
        let triggers = self.strings("OnBuild");
        self.set("OnBuild", Value::Null);
        triggers
    }

    /// MAINTAINER.
    pub fn set_author(&mut self, author: &str) {
        self.whole.insert("author".to_owned(), json!(author));
    }

    /// When the image was made, RFC 3339; empty if unknown.
    pub fn created(&self) -> &str {
        self.whole.get("created").and_then(Value::as_str).unwrap_or_default()
    }

    /// Adds to the history, and sets when the image was made.
    pub fn add_history(&mut self, created_by: &str, created: &str, empty_layer: bool) {
        let mut entry = Map::new();
        entry.insert("created".to_owned(), json!(created));
        entry.insert("created_by".to_owned(), json!(created_by));
        entry.insert("comment".to_owned(), json!("caisson"));
        if empty_layer {
            entry.insert("empty_layer".to_owned(), json!(true));
        }
        if let Some(Value::Array(history)) = self.whole.get_mut("history") {
            history.push(Value::Object(entry));
        }
        self.whole.insert("created".to_owned(), json!(created));
    }
}

/// Seconds since the Epoch in RFC 3339, UTC.
pub fn rfc3339(seconds: i64) -> String {
    let days = seconds.div_euclid(86_400);
    let time = seconds.rem_euclid(86_400);
    // Howard Hinnant's civil_from_days.
    let z = days.saturating_add(719_468);
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", time / 3600, time / 60 % 60, time % 60)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn times() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(rfc3339(1_709_210_096), "2024-02-29T12:34:56Z");
        assert_eq!(rfc3339(-1), "1969-12-31T23:59:59Z");
    }

    #[test]
    fn fields() {
        let mut config =
            Config::parse(br#"{"config":{"Env":["A=1","PATH=/x"],"Cmd":["base"],"Foo":1},"rootfs":{}}"#).unwrap();
        config.set_env("A", "2");
        config.set_env("B", "3");
        assert_eq!(config.environment(), ["A=2", "PATH=/x", "B=3"]);
        config.set_entrypoint(&Command::Shell("run it".into()), false);
        config.expose("80-81/UDP").unwrap();
        assert!(config.expose("x").is_err());
        assert!(config.expose("9-8").is_err());
        assert!(config.expose("80/icmp").is_err());
        config.set_label("k", "v");
        config.add_trigger("RUN x");
        config.add_history("ENV A=2", "2024-01-01T00:00:00Z", true);
        let json = config.json();
        let inner = &json["config"];
        assert_eq!(inner["Entrypoint"], json!(["/bin/sh", "-c", "run it"]));
        assert_eq!(inner["Cmd"], Value::Null);
        assert_eq!(inner["Foo"], 1);
        assert_eq!(inner["ExposedPorts"], json!({ "80/udp": {}, "81/udp": {} }));
        assert_eq!(json["created"], "2024-01-01T00:00:00Z");
        assert_eq!(config.take_triggers(), ["RUN x"]);
        assert!(config.take_triggers().is_empty());
        assert_eq!(Config::scratch().env("PATH").as_deref(), Some(DEFAULT_PATH));
    }
}
