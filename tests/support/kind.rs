use std::collections::BTreeSet;
use std::io::{self, Write};
use std::sync::OnceLock;

const WITHOUT: &str = "DIESEL_SESSION_TEST_WITHOUT";
const NAMES: [&str; 3] = ["postgres", "mysql", "browser"];

/// A kind of database under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Sqlite,
    Postgres,
    Mariadb,
}

/// False only for a kind that `DIESEL_SESSION_TEST_WITHOUT=postgres,mysql` names.
pub fn enabled(kind: Kind) -> bool {
    match kind {
        Kind::Sqlite => true,
        Kind::Postgres => is_on("postgres"),
        Kind::Mariadb => is_on("mysql"),
    }
}

/// False only where the same variable names `browser`.
pub fn browser_enabled() -> bool {
    is_on("browser")
}

/// Panics if a test uses a server that was switched off.
pub(super) fn require(kind: Kind) {
    assert!(enabled(kind), "{kind:?} is switched off by {WITHOUT}; ask support::enabled first");
}

fn is_on(name: &str) -> bool {
    static SWITCHED_OFF: OnceLock<BTreeSet<String>> = OnceLock::new();
    !SWITCHED_OFF.get_or_init(announced).contains(name)
}

/// Written past the capture of the test harness, so that what is switched off never goes unnoticed.
fn announced() -> BTreeSet<String> {
    let list = std::env::var(WITHOUT).unwrap_or_default();
    let names: BTreeSet<String> =
        list.split(',').map(str::trim).filter(|name| !name.is_empty()).map(String::from).collect();
    for name in &names {
        assert!(NAMES.contains(&name.as_str()), "{WITHOUT} knows {NAMES:?}, not `{name}`");
        let _ = writeln!(io::stderr(), "\n*** {WITHOUT}: every test that needs {name} is SWITCHED OFF ***\n");
    }
    names
}
