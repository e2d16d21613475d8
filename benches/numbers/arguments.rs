//! What the command line asks for.

use std::fmt;
use std::os::unix::process::CommandExt;
use std::process::Command;

const USAGE: &str = "cargo bench --all-features -- \
    [--pin CPU] [--rounds N] [reads] [checkout] [contended] [render] [web] [unit] [apps]";

const SECTIONS: [&str; 8] = ["reads", "checkout", "contended", "render", "web", "pooler", "unit", "apps"];

pub struct Arguments {
    pub rounds: usize,
    /// The CPU to run on.
    pin: Option<String>,
    /// Already bound to it.
    bound: bool,
    only: Vec<String>,
}

impl Arguments {
    pub fn read() -> Result<Self, String> {
        let mut read = Self { rounds: 15, pin: None, bound: false, only: Vec::new() };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut number = || {
                let value = arguments.next().and_then(|value| value.parse::<usize>().ok());
                value.ok_or_else(|| format!("{argument} needs a number: {USAGE}"))
            };
            match &*argument {
                // Cargo's own.
                "--bench" => {}
                "--rounds" => read.rounds = number()?.max(1),
                "--pin" => read.pin = Some(number()?.to_string()),
                "--bound" => read.bound = true,
                section if SECTIONS.contains(&section) => read.only.push(argument),
                _ => return Err(format!("`{argument}` is not known here: {USAGE}")),
            }
        }
        Ok(read)
    }

    /// Starts over on the CPU that was asked for. What this program starts inherits it.
    pub fn pinned(self) -> Result<Self, String> {
        let Some(cpu) = self.pin.as_ref().filter(|_| !self.bound) else { return Ok(self) };
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let again =
            Command::new("taskset").args(["-c", cpu]).arg(program).args(std::env::args().skip(1)).arg("--bound").exec();
        Err(format!("cannot run `taskset -c {cpu}`, which util-linux has: {again}"))
    }

    pub fn runs(&self, section: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == section)
    }
}

impl fmt::Display for Arguments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cpus = std::thread::available_parallelism().map_or(0, usize::from);
        match &self.pin {
            Some(cpu) => write!(f, "pinned to CPU {cpu}")?,
            None => write!(f, "not pinned, {cpus} CPUs")?,
        }
        write!(f, "; medians of {} interleaved rounds, ratios round by round [least .. most]", self.rounds)
    }
}
