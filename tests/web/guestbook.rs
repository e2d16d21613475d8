use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;

use serde_json::Value;

use crate::fixtures::TestDatabase;
use crate::service::Service;

/// The guestbook program, running on one of the databases.
pub(crate) struct Guestbook {
    service: Service,
    pid: u32,
    /// Where it is open, with a `/` at the end.
    address: String,
}

impl Guestbook {
    pub(crate) fn on(test_db: &TestDatabase) -> Guestbook {
        let mut service = Service::new();
        let variables = [("DATABASE_URL", test_db.url()), ("PORT", "0".to_owned())];
        let variables = variables.each_ref().map(|(name, value)| (*name, value.as_str()));
        let (pid, address) = service.start(program(), &variables, &[], OPEN);
        Guestbook { service, pid, address }
    }

    pub(crate) fn at(&self, path: &str) -> String {
        format!("{}{path}", self.address)
    }

    /// Host and port.
    pub(crate) fn place(&self) -> &str {
        self.address.trim_start_matches("http://").trim_end_matches('/')
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// It speaks of nothing but errors once it is open.
    #[track_caller]
    pub(crate) fn assert_no_errors(&self) {
        assert_eq!(self.service.log(), format!("{OPEN}{}\n", self.address), "the guestbook's log");
    }
}

impl Drop for Guestbook {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("The guestbook's log:\n{}", self.service.log());
        }
    }
}

const OPEN: &str = "The guestbook is open at ";

/// Where the results of this build are.
pub(crate) fn target_folder() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("a folder in the target folder")
}

/// The example as it is now: Cargo builds it, unless it has already.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let built = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "--example", "guestbook", "--all-features", "--message-format=json-render-diagnostics"])
            .arg("--target-dir")
            .arg(target_folder())
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stderr(Stdio::inherit())
            .output()
            .expect("cargo runs");
        assert!(built.status.success(), "the guestbook cannot be built");
        let messages = built.stdout.split(|byte| *byte == b'\n').flat_map(serde_json::from_slice::<Value>);
        let mut programs = messages.filter(|message| message["target"]["name"] == "guestbook");
        programs.find_map(|message| Some(message["executable"].as_str()?.into())).expect("Cargo names the program")
    })
}
