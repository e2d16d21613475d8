use std::collections::BTreeSet;
use std::io::{self, Write};
use std::sync::OnceLock;

const WITHOUT: &str = "DIESEL_SESSION_TEST_WITHOUT";

/// A database server that the tests want to talk to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Postgres,
    Mysql,
}

/// False only for a kind that `DIESEL_SESSION_TEST_WITHOUT=postgres,mysql` names.
pub fn enabled(kind: Kind) -> bool {
    static WITHOUT_KINDS: OnceLock<BTreeSet<Kind>> = OnceLock::new();
    !WITHOUT_KINDS.get_or_init(announced).contains(&kind)
}

/// What a test hears that asks for a server which was switched off.
pub(super) fn require(kind: Kind) {
    assert!(enabled(kind), "{kind:?} is switched off by {WITHOUT}; ask support::enabled first");
}

/// Written past the capture of the test harness, so that a switched off database never goes unnoticed.
fn announced() -> BTreeSet<Kind> {
    let list = std::env::var(WITHOUT).unwrap_or_default();
    let kinds: BTreeSet<Kind> = list.split(',').map(str::trim).filter(|name| !name.is_empty()).map(parse).collect();
    for kind in &kinds {
        let _ = writeln!(io::stderr(), "\n*** {WITHOUT}: every test that needs {kind:?} is SWITCHED OFF ***\n");
    }
    kinds
}

fn parse(name: &str) -> Kind {
    match name {
        "postgres" => Kind::Postgres,
        "mysql" => Kind::Mysql,
        other => panic!("{WITHOUT} knows `postgres` and `mysql`, not `{other}`"),
    }
}
