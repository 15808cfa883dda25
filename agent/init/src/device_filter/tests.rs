use super::*;
use proptest::prelude::*;

const KINDS: [(u8, i32); 2] = [(b'b', DEVICE_BLOCK), (b'c', DEVICE_CHAR)];

/// Executes a program as the kernel would.
fn execute(program: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> u32 {
    let context = [access << 16 | kind, major, minor];
    let mut registers = [0_u32; 6];
    let mut at = 0;
    loop {
        let i = program[at];
        at += 1;
        let (d, s, k) = (usize::from(i.destination), usize::from(i.source), i.constant.cast_unsigned());
        let offset = usize::try_from(i.offset).unwrap();
        match i.operation {
            LOAD_32 => registers[d] = context[offset / 4],
            MOVE_32 => registers[d] = k,
            MOVE_32_FROM => registers[d] = registers[s],
            AND_32 => registers[d] &= k,
            SHIFT_RIGHT_32 => registers[d] >>= k,
            JUMP_IF_NOT_32 => at += if registers[d] == k { 0 } else { offset },
            JUMP_IF_32 => at += if registers[d] == k { offset } else { 0 },
            EXIT => return registers[0],
            other => panic!("operation {other:#x}"),
        }
    }
}

/// What the rules mean, said in another way.
fn allowed(rules: &[DeviceRule], kind: u8, access: u32, major: u32, minor: u32) -> bool {
    [1, 2, 4].iter().filter(|bit| access & **bit != 0).all(|bit| {
        let speaks = |rule: &&DeviceRule| {
            (rule.kind == b'a' || rule.kind == kind)
                && rule.major.is_none_or(|n| n == major)
                && rule.minor.is_none_or(|n| n == minor)
                && u32::from(rule.access) & bit != 0
        };
        rules.iter().rev().find(speaks).is_some_and(|rule| rule.allow)
    })
}

fn rule() -> impl Strategy<Value = DeviceRule> {
    let number = || prop_oneof![Just(None), (0..3_u32).prop_map(Some), Just(Some(u32::MAX))];
    (any::<bool>(), prop::sample::select(&b"abc"[..]), number(), number(), 0..8_u8)
        .prop_map(|(allow, kind, major, minor, access)| DeviceRule { allow, kind, major, minor, access })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn programs_decide_as_the_rules_say(
        rules in prop::collection::vec(rule(), 0..12), kind in 0..2_usize, access in 1..8_u32, major in 0..4_u32, minor in 0..4_u32,
    ) {
        let program = compile(&rules);
        let (name, number) = KINDS[kind];
        let got = execute(&program, number.cast_unsigned(), access, major, minor);
        prop_assert_eq!(got == 1, allowed(&rules, name, access, major, minor));
    }
}

#[test]
fn the_kernel_takes_the_programs() {
    let all = |allow| DeviceRule { allow, kind: b'a', major: None, minor: None, access: 7 };
    let zero = DeviceRule { allow: true, kind: b'c', major: Some(1), minor: Some(5), access: 6 };
    let no_mknod = DeviceRule { allow: false, kind: b'b', major: None, minor: Some(u32::MAX), access: 1 };
    for rules in [vec![all(false)], vec![all(true)], vec![all(false), zero.clone()], vec![zero, no_mknod, all(true)]] {
        if let Err(failure) = load(&rules) {
            // Without the right to load programs there is nothing to be seen here.
            assert!(failure.message.ends_with("operation not permitted"), "{}: {rules:?}", failure.message);
            println!("skipped: {}", failure.message);
            return;
        }
    }
}
