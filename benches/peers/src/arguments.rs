//! What the command line asks for.

use std::fmt;
use std::os::unix::process::CommandExt;
use std::process::Command;

const USAGE: &str = "cargo run --release -- [--pin CPU] [--rounds N] [--only SERVER] [--mode 1|2|3]";

pub struct Arguments {
    pub rounds: usize,
    /// What the names of the ways begin with; the first of all is always there.
    pub only: String,
    /// The one of the modes to measure, from 1; 0 for all of them.
    pub mode: usize,
    /// The CPU to run on.
    pin: Option<String>,
    /// Already bound to it.
    bound: bool,
}

impl Arguments {
    pub fn read() -> Result<Self, String> {
        let mut read = Self { rounds: 5, only: String::new(), mode: 0, pin: None, bound: false };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            if argument == "--only" {
                read.only = arguments.next().ok_or_else(|| format!("--only needs a name: {USAGE}"))?;
                continue;
            }
            let mut number = || {
                let value = arguments.next().and_then(|value| value.parse::<usize>().ok());
                value.ok_or_else(|| format!("{argument} needs a number: {USAGE}"))
            };
            match &*argument {
                "--rounds" => read.rounds = number()?.max(1),
                "--mode" => read.mode = number()?,
                "--pin" => read.pin = Some(number()?.to_string()),
                "--bound" => read.bound = true,
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
}

impl fmt::Display for Arguments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.pin {
            Some(cpu) => write!(f, "pinned to CPU {cpu}")?,
            None => write!(f, "not pinned, {} CPUs", std::thread::available_parallelism().map_or(0, usize::from))?,
        }
        write!(f, "; medians of {} rounds [least .. most], ratios round by round", self.rounds)
    }
}
