#![allow(clippy::unwrap_used, clippy::panic)]
use super::*;
use proptest::prelude::*;

fn parse(text: &str) -> Dockerfile {
    Dockerfile::parse("Dockerfile", text).unwrap_or_else(|error| panic!("{error}"))
}

fn only(text: &str) -> Instruction {
    let file = parse(&format!("FROM scratch\n{text}"));
    let instructions = &file.stages[0].instructions;
    assert_eq!(instructions.len(), 1, "{instructions:?}");
    instructions[0].value.clone()
}

fn fail(text: &str) -> ParseError {
    Dockerfile::parse("Dockerfile", text).unwrap_err()
}

fn variables(name: &str) -> Option<String> {
    match name {
        "a" => Some("alpha".into()),
        "empty" => Some(String::new()),
        "path" => Some("/usr/local/lib.tar.gz".into()),
        "two" => Some("one two".into()),
        _ => None,
    }
}

#[test]
fn stages_and_names() {
    let file = parse(
        "# comment\nARG V=12\nARG W\nFROM --platform=linux/amd64 debian:$V AS Build\nRUN true\nfrom scratch\ncopy --from=build /a /b\n",
    );
    assert_eq!(file.global_args.len(), 2);
    assert_eq!(file.global_args[0].value, ("V".into(), Some("12".into())));
    assert_eq!(file.stages.len(), 2);
    let from = &file.stages[0].from;
    assert_eq!((from.line, from.value.image.as_str()), (4, "debian:$V"));
    assert_eq!(from.value.name.as_deref(), Some("build"));
    assert_eq!(from.value.platform.as_deref(), Some("linux/amd64"));
}

#[test]
fn continuations_comments_and_blank_lines() {
    let run = only("RUN one \\\n  # a comment\n\n  two \\  \n\tthree\n# end");
    let Instruction::Run(run) = run else { panic!() };
    assert_eq!(run.command, Command::Shell("one   two \tthree".into()));
    let Instruction::Run(run) = only("RUN echo a\\\\\n") else { panic!() };
    assert_eq!(run.command, Command::Shell("echo a\\\\".into()));
}

#[test]
fn escape_directive() {
    let file = parse("# syntax=docker/dockerfile:1\n# escape=`\nFROM scratch\nRUN dir `\n c:\\\n");
    assert_eq!(file.escape, '`');
    let Instruction::Run(run) = &file.stages[0].instructions[0].value else { panic!() };
    assert_eq!(run.command, Command::Shell("dir  c:\\".into()));
    assert_eq!(parse("# hello\n# escape=`\nFROM a").escape, '\\');
    assert_eq!(fail("# escape=x\nFROM a").line, 1);
    assert_eq!(fail("# escape=`\n# escape=`\nFROM a").line, 2);
}

#[test]
fn heredocs() {
    let Instruction::Run(run) = only("RUN <<EOF\necho 1\n# not a comment\n\necho 2\nEOF\n") else { panic!() };
    assert_eq!(run.heredocs.len(), 1);
    assert_eq!(run.heredocs[0].content, "echo 1\n# not a comment\n\necho 2\n");
    let Instruction::Copy(copy) = only("COPY <<-'A' <<B /dest/\n\tx $y\n\tA\nb\nB") else { panic!() };
    let [CopySource::Heredoc(a), CopySource::Heredoc(b)] = copy.sources.as_slice() else { panic!("{copy:?}") };
    assert_eq!((a.name.as_str(), a.content.as_str()), ("A", "x $y\n"));
    assert!(!a.expand && b.expand);
    assert_eq!(b.content, "b\n");
    let Instruction::Run(run) = only("RUN python3 - 3<<X && cat <<<here\nprint()\nX") else { panic!() };
    assert_eq!(run.heredocs.len(), 1);
    let error = fail("FROM a\nRUN <<EOF\nnever");
    assert_eq!(error.line, 2);
    assert!(error.to_string().contains("EOF"), "{error}");
}

#[test]
fn run_flags() {
    let Instruction::Run(run) =
        only("RUN --mount=type=cache,dst=/c,id=x --mount=type=secret,id=s --network=none [\"a\", \"b c\"]")
    else {
        panic!()
    };
    assert_eq!(run.command, Command::Exec(vec!["a".into(), "b c".into()]));
    assert_eq!(run.network, NetworkMode::None);
    assert_eq!(run.mounts[0].kind, "cache");
    assert_eq!(run.mounts[0].options[0], ("target".into(), "/c".into()));
    // A line in brackets that is no JSON is the shell's.
    let Instruction::Run(run) = only("RUN [ -f /x ] && true") else { panic!() };
    assert_eq!(run.command, Command::Shell("[ -f /x ] && true".into()));
}

#[test]
fn copy_flags() {
    let Instruction::Copy(copy) = only("COPY --from=0 --chown=\"a:b\" --chmod=0755 --link --exclude=*.o a b/ /c/")
    else {
        panic!()
    };
    assert_eq!(copy.from.as_deref(), Some("0"));
    assert_eq!(copy.chown.as_deref(), Some("a:b"));
    assert!(copy.link);
    assert_eq!(copy.sources.len(), 2);
    assert_eq!(copy.destination, "/c/");
    let Instruction::Copy(copy) = only("ADD [\"a b\", \"/c d\"]") else { panic!() };
    assert!(copy.add);
    assert_eq!(copy.sources, [CopySource::Path("a b".into())]);
}

#[test]
fn pairs() {
    assert_eq!(
        only("ENV a=1 b=\"x y\" c=x\\ y"),
        Instruction::Env(vec![("a".into(), "1".into()), ("b".into(), "\"x y\"".into()), ("c".into(), "x\\ y".into())])
    );
    assert_eq!(only("ENV name the rest = of it"), Instruction::Env(vec![("name".into(), "the rest = of it".into())]));
    assert_eq!(only("LABEL \"k 1\"=v"), Instruction::Label(vec![("\"k 1\"".into(), "v".into())]));
    assert!(fail("FROM a\nENV a=1 b").message.contains("no ="));
}

#[test]
fn healthcheck_and_the_rest() {
    let Instruction::Healthcheck(check) =
        only("HEALTHCHECK --interval=1m30s --timeout=500ms --retries=3 CMD curl -f x")
    else {
        panic!()
    };
    assert_eq!(check.interval_ns, Some(90_000_000_000));
    assert_eq!(check.timeout_ns, Some(500_000_000));
    assert_eq!(check.retries, Some(3));
    assert_eq!(only("HEALTHCHECK NONE"), Instruction::Healthcheck(Healthcheck::default()));
    assert_eq!(only("ONBUILD RUN make"), Instruction::OnBuild("RUN make".into()));
    assert_eq!(only("SHELL [\"/bin/bash\", \"-c\"]"), Instruction::Shell(vec!["/bin/bash".into(), "-c".into()]));
    for wrong in [
        "ONBUILD FROM x",
        "ONBUILD ONBUILD RUN x",
        "SHELL bash",
        "HEALTHCHECK maybe",
        "COPY one",
        "RUN",
        "FROM a b",
        "RUN --mount=type=tmpfs x",
        "RUN --mount=type=blob,target=/x x",
        "HEALTHCHECK --interval=5 CMD x",
    ] {
        assert_eq!(fail(&format!("FROM a\n\n{wrong}")).line, 3, "{wrong}");
    }
}

#[test]
fn errors_show_line_and_advice() {
    let error = fail("FROM a\nRUNN make\n");
    assert_eq!(error.to_string(), "Dockerfile:2: unknown instruction RUNN\n  2 | RUNN make\n  help: did you mean RUN?");
    assert!(fail("").to_string().contains("FROM"));
    assert!(fail("RUN x").message.contains("before the first FROM"));
}

#[test]
fn expansion() {
    for (text, expected) in [
        ("$a", "alpha"),
        ("${a}b", "alphab"),
        ("'$a'", "$a"),
        ("\"$a x\"", "alpha x"),
        ("\\$a", "$a"),
        ("\"\\$a \\n\"", "$a \\n"),
        ("${x:-d}", "d"),
        ("${x-d}", "d"),
        ("${empty:-d}", "d"),
        ("${empty-d}", ""),
        ("${a:+yes}", "yes"),
        ("${empty:+yes}", ""),
        ("${empty+yes}", "yes"),
        ("${x:-${a}}", "alpha"),
        ("${path#/*/}", "local/lib.tar.gz"),
        ("${path##*/}", "lib.tar.gz"),
        ("${path%.*}", "/usr/local/lib.tar"),
        ("${path%%.*}", "/usr/local/lib"),
        ("${path/l/L}", "/usr/Local/lib.tar.gz"),
        ("${path//l/L}", "/usr/LocaL/Lib.tar.gz"),
        ("${path//\\//_}", "_usr_local_lib.tar.gz"),
        ("${a/al?ha/beta}", "beta"),
        ("a$", "a$"),
        ("$1x", "x"),
        ("", ""),
        ("a\"b c\"d", "ab cd"),
    ] {
        assert_eq!(expand(text, '\\', &variables).as_deref(), Ok(expected), "{text}");
    }
    assert_eq!(expand("${x:?is needed}", '\\', &variables).unwrap_err().to_string(), "x: is needed");
    for wrong in ["${a", "${}", "\"", "'", "${a:=x}", "${a^}"] {
        assert!(expand(wrong, '\\', &variables).is_err(), "{wrong}");
    }
    assert_eq!(expand_words("80 $two \"$two\" ''", '\\', &variables).unwrap(), ["80", "one", "two", "one two", ""]);
    assert_eq!(expand::expand_heredoc("\"$a\" '\\$a' \\n\n", '\\', &variables).unwrap(), "\"alpha\" '$a' \\n\n");
}

#[test]
fn triggers() {
    assert!(matches!(parse_trigger("COPY . /src").unwrap(), Instruction::Copy(_)));
    assert!(parse_trigger("FROM x").is_err());
    assert!(parse_trigger("RUN a\nRUN b").is_err());
    let Instruction::OnBuild(text) = only("ONBUILD RUN <<EOF\nx\nEOF") else { panic!() };
    let Instruction::Run(run) = parse_trigger(&text).unwrap() else { panic!() };
    assert_eq!(run.heredocs[0].content, "x\n");
}

proptest! {
    // A fixed seed: the same cases on every machine.
    #![proptest_config(ProptestConfig { rng_seed: proptest::test_runner::RngSeed::Fixed(5), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn garbage_does_not_panic(text in "\\PC*") {
        let _ = Dockerfile::parse("f", &text);
    }

    #[test]
    fn likely_garbage_does_not_panic(lines in proptest::collection::vec(
        "(FROM|RUN|COPY|ADD|ENV|ARG|ONBUILD|HEALTHCHECK|LABEL|# escape=|VOLUME|EOF|)[ \t]?[-a$<{}\\[\\]\"'\\\\`=, :/#\u{e9}EOF]{0,24}", 0..12)) {
        let _ = Dockerfile::parse("f", &format!("FROM a\n{}", lines.join("\n")));
        let _ = Dockerfile::parse("f", &lines.join("\n"));
    }

    #[test]
    fn expansion_does_not_panic(text in "[-a$<{}\"'\\\\=:/#%*?+ \u{e9}]{0,40}") {
        let _ = expand(&text, '\\', &variables);
        let _ = expand_words(&text, '`', &variables);
        let _ = expand::expand_heredoc(&text, '\\', &variables);
    }
}
