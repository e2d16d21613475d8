//! A test suite: a number of tests, each with a new application.

use std::time::{Duration, Instant};

use super::bar::Scale;
use super::outcome::{Failure, Outcome};
use super::page;
use super::server::Server;
use crate::Result;

/// Maximum number of applications. More applications show nothing new.
const MOST: usize = 130;

pub(crate) trait Suite {
    /// Runs one test, which fails if its application fails.
    fn test(&mut self, number: usize) -> Result<()>;
}

/// The number of tests. If each leaves one session, the server runs out of slots one test before the last.
pub(crate) fn length(slots: usize) -> usize {
    (slots + 2).min(MOST)
}

/// Runs the suite up to its first failure and prints the server's count after every application.
pub(crate) fn run(name: &'static str, mut suite: impl Suite, server: &Server) -> Result<Outcome> {
    server.wait_until_empty()?;
    let before = server.sessions_ever()?;
    let (told, most) = server.most_during(|| tell(&mut suite, server));
    let (worked, failure, spent) = told?;
    let left = server.sessions_that_stay()?;
    drop(suite);
    server.wait_until_empty()?;
    let opened = server.sessions_ever()?.zip(before).map(|(after, before)| after - before);
    Ok(Outcome { name, worked, failure, most, opened, left, spent })
}

/// Runs the tests. Returns the number of tests that worked, the failure, and the time of the tests that worked.
fn tell(suite: &mut impl Suite, server: &Server) -> Result<(usize, Option<Failure>, Duration)> {
    let slots = server.slots.free();
    let scale = Scale::new(slots);
    let mut spent = Duration::ZERO;
    for number in 1..=length(slots) {
        let started = Instant::now();
        let outcome = suite.test(number);
        let took = started.elapsed();
        let line = format!("  app {number:>3}  {}", scale.bar(server.sessions_that_stay()?));
        match outcome {
            Ok(()) => {
                println!("{line}");
                spent += took;
            }
            Err(error) => {
                println!("{line}  FAILED after {:.1} s:", took.as_secs_f64());
                page::print(8, &error.to_string());
                return Ok((number - 1, Some(Failure { number, after: took }), spent));
            }
        }
    }
    Ok((length(slots), None, spent))
}
