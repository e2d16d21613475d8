//! A transaction that is run again when the database asks for it.

use std::hash::{BuildHasher, RandomState};
use std::panic::Location;
use std::time::{Duration, Instant};

use super::Session;
use super::hooks::Mark;
use super::session_inner::SessionInner;
use super::transaction_scope::TransactionScope;
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};

/// The longest pause before the second attempt; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// The longest pause of all.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How often [`Session::retry`] runs its closure; a number is the usual way to say it.
///
/// ```
/// use diesel_session::Retry;
///
/// let thrice: Retry = 3.into();
/// let thrice_whatever_happened = Retry::attempts(3).even_if_commit_unknown();
/// # let _ = (thrice, thrice_whatever_happened);
/// ```
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct Retry {
    attempts: u32,
    even_if_commit_unknown: bool,
}

impl Retry {
    /// At most so many attempts, the first one included. The closure always runs once, so 0 is the same as 1.
    pub fn attempts(attempts: u32) -> Self {
        Self { attempts, even_if_commit_unknown: false }
    }

    /// Runs the transaction again also after [`Error::CommitUnknown`], although it may have been committed: for what may be done
    /// twice, such as a transaction that first looks whether it has been done.
    pub fn even_if_commit_unknown(mut self) -> Self {
        self.even_if_commit_unknown = true;
        self
    }
}

impl From<u32> for Retry {
    fn from(attempts: u32) -> Self {
        Self::attempts(attempts)
    }
}

impl<C: SessionConnection> Session<C> {
    /// Runs a whole transaction, and runs it again when the database asks for that: after a serialization failure, a deadlock, a
    /// lock that was not to be had in time (MySQL, MariaDB) or `SQLITE_BUSY`, at `BEGIN`, in `body` or at `COMMIT`. It does so too
    /// after an error that comes of the connection: another program has changed the schema, or the server takes no writes any more, most
    /// often after a failover. The next attempt gets another connection. Everything else is returned at once. Each attempt is a [`transaction`](Self::transaction) of its own: it begins, `body` runs, and `Ok`
    /// is committed. The last attempt's error is returned as it is.
    ///
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { stock (id) { id -> Integer, left -> Integer, } }
    /// # let app = DB.init_app("retry", Config::new(":memory:"))?;
    /// # app.context(|| {
    /// # DB.session()?.with(|conn| diesel::connection::SimpleConnection::batch_execute(conn,
    /// #     "CREATE TABLE stock (id INTEGER PRIMARY KEY, left INTEGER NOT NULL); INSERT INTO stock VALUES (7, 3)"))?;
    /// # DB.session()?.commit()?;
    /// let left = DB.session()?.retry(5, |session| {
    ///     let left: i32 = session.get_result(stock::table.find(7).select(stock::left))?;
    ///     session.execute(diesel::update(stock::table.find(7)).set(stock::left.eq(left - 1)))?;
    ///     Ok::<_, Error>(left - 1)
    /// })?;
    /// assert_eq!(left, 2);
    /// # Ok::<(), Error>(())
    /// # })?;
    /// # app.dispose()?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// **What is known** of tracked rows is forgotten before each attempt. Inside of one, `find`, `get` and `track` read, and so do
    /// [`read`](crate::Tracked::read), [`write`](crate::Tracked::write) and `delete` of a handle from before, once for each row. If such
    /// a row cannot be read at that moment, the value that was known is given out, and the transaction is committed only if the row still
    /// has that value; otherwise the error is [`Error::Stale`].
    ///
    /// **What is repeated.** `body` sees a fresh session each time; what it has done outside of the session is for it to undo or to do
    /// again. The failure may be inside whatever error type `body` makes of it, as the session itself remembers that a statement of
    /// this transaction failed so, also one of code that it guarded the connection to. A failure that a savepoint has undone, and after
    /// which `body` has sent something else, has been dealt with and is no reason to begin anew. A panic is not repeated.
    ///
    /// **Between two attempts** the session holds no connection. It pauses for 5 to 10 ms before the second one, for twice as long
    /// before the next, and so on up to 0.5 to 1 s; how long exactly is left to chance, so that two that were in each other's way do not
    /// meet again. Where the pause would end after the scope's deadline, there is no other attempt.
    ///
    /// **Not repeated** is [`Error::CommitUnknown`], because what may have been done would be done twice
    /// ([`Retry::even_if_commit_unknown`] allows it; [`Error::resolve`] may know), and [`Error::ConnectionLost`]: for that the program
    /// calls `retry` again where it may. Nor is an `Err` of `body`'s own making, whatever [`Error::is_transient`] says of it: the database
    /// has not asked.
    ///
    /// **Hooks** of an attempt that is rolled back go with it: its `after_rollback` hooks run, the others are dropped. Those registered
    /// before `retry` belong to the last attempt. A `before_commit` hook among them can run only once, so with one an
    /// attempt whose commit fails is the last.
    ///
    /// # Errors
    /// Those of `body`, and those of [`begin`](Self::begin) and [`commit`](Self::commit) turned into `E`.
    /// [`Error::NotRepeatable`] inside a closure of `transaction`, `savepoint` or another `retry`, and where the session has begun:
    /// what came before could not be repeated.
    #[track_caller]
    pub fn retry<T, E: From<Error>>(
        &self,
        attempts: impl Into<Retry>,
        mut body: impl FnMut(&Self) -> Result<T, E>,
    ) -> Result<T, E> {
        let at = Location::caller();
        let retrying = Retrying::start(&self.0, attempts.into(), at)?;
        let mut attempt = 0;
        loop {
            attempt += 1;
            let pause = pause_after(attempt);
            if let Err(error) = self.0.begin(at) {
                if !(retrying.is_possible(attempt, pause) && retrying.is_asked_for_by(&error)) {
                    if attempt > 1 {
                        self.0.tell_rollback();
                    }
                    return Err(error.into());
                }
            } else {
                let block = TransactionScope::open(&self.0, "retry", at, false);
                self.0.unit_begin_attempt();
                let outcome = body(self);
                block.close();
                let possible = retrying.is_possible(attempt, pause);
                match outcome {
                    Ok(value) => match retrying.commit(possible) {
                        Ok(()) => return Ok(value),
                        Err((error, true)) => drop(error),
                        Err((error, false)) => {
                            self.0.roll_back_for(&error, at);
                            return Err(self.0.with_undo(error).into());
                        }
                    },
                    Err(error) => {
                        if !(possible && self.0.failed_transiently()) {
                            self.0.undo(at);
                            return Err(error);
                        }
                    }
                }
                self.0.undo_since(retrying.mark, at);
            }
            let app = self.0.app().id();
            crate::wording::log_line!(
                debug,
                "diesel_session::session",
                "app `{app}`: attempt {attempt} of the `retry` at {at} is to be repeated in {pause:?}"
            );
            std::thread::sleep(pause);
        }
    }
}

/// A call of `retry`.
struct Retrying<'s, C: SessionConnection> {
    session: &'s SessionInner<C>,
    retry: Retry,
    at: Place,
    /// Hooks from before.
    mark: Mark,
    /// There is a `before_commit` hook from before.
    commits_once: bool,
}

impl<'s, C: SessionConnection> Retrying<'s, C> {
    fn start(session: &'s SessionInner<C>, retry: Retry, at: Place) -> Result<Self> {
        if let Some(&(outer, since)) = session.blocks.borrow().last() {
            return Err(Error::NotRepeatable { inside: Some(outer), since, at });
        }
        if let Some(since) = session.enter(at)?.active_since() {
            return Err(Error::NotRepeatable { inside: None, since, at });
        }
        // A second attempt would not find what the first has flushed.
        if let Some(since) = session.unflushed_since() {
            return Err(Error::NotRepeatable { inside: None, since, at });
        }
        let hooks = session.hooks.borrow();
        Ok(Self { session, retry, at, mark: hooks.mark(), commits_once: hooks.has_before_commit() })
    }

    /// Whether there may be another attempt, after such a pause.
    fn is_possible(&self, attempt: u32, pause: Duration) -> bool {
        attempt < self.retry.attempts && self.session.deadline().is_none_or(|end| Instant::now() + pause < end)
    }

    /// Whether the database asks for another attempt.
    fn is_asked_for_by(&self, error: &Error) -> bool {
        match error {
            Error::Query { source, .. } => self.session.app().options().target.kind.is_transient(source),
            // The queue of this process's writers.
            Error::LockTimeout { .. } => true,
            Error::RollbackRequired { .. } => self.session.failed_transiently(),
            Error::CommitUnknown(_) => self.retry.even_if_commit_unknown,
            _ => false,
        }
    }

    /// The error of a commit that failed comes with whether there is to be another attempt.
    fn commit(&self, possible: bool) -> Result<(), (Error, bool)> {
        let again = |error: &Error| possible && !self.commits_once && self.is_asked_for_by(error);
        self.session.commit_with(self.at, |error| again(error).then_some(self.mark)).map_err(|error| {
            let again = again(&error);
            (error, again)
        })
    }
}

fn pause_after(attempt: u32) -> Duration {
    let longest = 2_u32.checked_pow(attempt - 1).map_or(LONGEST_PAUSE, |factor| FIRST_PAUSE.saturating_mul(factor));
    let chance = RandomState::new().hash_one(attempt) % 1000;
    longest.min(LONGEST_PAUSE).mul_f64(0.5 + 0.5 * chance as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_second_and_are_left_to_chance() {
        for (attempt, longest) in [(1, 10), (2, 20), (5, 160), (7, 640), (8, 1000), (40, 1000), (u32::MAX, 1000)] {
            let pauses: Vec<_> = (0..50).map(|_| pause_after(attempt)).collect();
            let longest = Duration::from_millis(longest);
            assert!(pauses.iter().all(|pause| *pause >= longest / 2 && *pause <= longest), "{attempt}: {pauses:?}");
            assert!(pauses.iter().any(|pause| *pause != pauses[0]), "{attempt}");
        }
    }
}
