//! A way of isolating tests, and what one test costs with it.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

/// How the tests of a binary are run.
#[derive(Clone, Copy, PartialEq)]
pub enum Mode {
    /// One process for all, with so many threads.
    Together(usize),
    /// A process for each of the first few, one after the other.
    Apart,
}

/// How many tests get a process each: there the start of it is most of a test, whatever their number.
pub const APART: usize = 20;

impl Mode {
    pub const ALL: [Mode; 3] = [Mode::Together(1), Mode::Together(2), Mode::Apart];

    pub fn name(self) -> String {
        match self {
            Mode::Together(1) => "one process, 1 thread".to_owned(),
            Mode::Together(threads) => format!("one process, {threads} threads"),
            Mode::Apart => "a process per test".to_owned(),
        }
    }
}

pub struct Contender {
    pub name: &'static str,
    pub binary: PathBuf,
    /// What the names of its tests begin with.
    pub prefix: &'static str,
    pub url: String,
    /// Its tests can run beside each other.
    pub parallel: bool,
}

impl Contender {
    /// Milliseconds per test.
    pub fn run(&self, mode: Mode) -> Result<f64, String> {
        let mut names = self.tests()?;
        if mode == Mode::Apart {
            names.truncate(APART);
        }
        let start = Instant::now();
        match mode {
            Mode::Together(threads) => {
                // A prefix chooses the same tests as their names, and keeps the command line short.
                let threads = format!("--test-threads={threads}");
                let filter: &[&str] = if self.prefix.is_empty() { &[] } else { &[self.prefix] };
                self.call(&[filter, &[&*threads]].concat())?;
            }
            Mode::Apart => {
                for name in &names {
                    self.call(&["--exact", name])?;
                }
            }
        }
        Ok(start.elapsed().as_secs_f64() * 1e3 / names.len() as f64)
    }

    fn tests(&self) -> Result<Vec<String>, String> {
        let list = self.call(&["--list", "--format=terse"])?;
        let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
        let names: Vec<String> = names.filter(|name| name.starts_with(self.prefix)).map(str::to_owned).collect();
        if names.is_empty() { Err(format!("{} has no tests", self.name)) } else { Ok(names) }
    }

    fn call(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new(&self.binary);
        command.args(arguments).env("DATABASE_URL", &self.url).stdin(Stdio::null());
        let output = command.output().map_err(|error| format!("{}: {error}", self.binary.display()))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(said);
        }
        Err(format!("{} failed: {said}{}", self.name, String::from_utf8_lossy(&output.stderr)))
    }
}
