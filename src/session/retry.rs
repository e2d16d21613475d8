//! A transaction that is run again if the database asks for it.

use std::hash::{BuildHasher, RandomState};
use std::panic::Location;
use std::time::{Duration, Instant};

use super::Session;
use super::hooks::{HookEvent, run_after};
use super::session_inner::{SessionInner, TransactionScope};
use crate::connection::SessionConnection;
use crate::error::{Details, Error, Result, SourceLocation};

/// The longest pause before the second attempt. It doubles with each further attempt.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// The longest pause before any attempt.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause before a server that refuses to write is asked again.
const LONGEST_PAUSE_FOR_PRIMARY: Duration = Duration::from_millis(150);

/// How often [`Session::retry`] runs its closure. Usually the program passes a number.
///
/// ```
/// use diesel_session::session::Retry;
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
    /// At most this number of attempts, the first one included. The closure always runs once, so 0 means the same as
    /// 1.
    pub fn attempts(attempts: u32) -> Self {
        Self { attempts, even_if_commit_unknown: false }
    }

    /// Runs the transaction again also after [`ErrorKind::CommitUnknown`](crate::ErrorKind::CommitUnknown), although it
    /// may have been committed. The transaction must be idempotent, for example because it first checks whether its
    /// work has been done.
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

/// # A transaction that runs again
impl<C: SessionConnection> Session<C> {
    /// Runs a whole transaction, and runs it again if the database asks for that: after a serialization failure, a
    /// deadlock, a lock timeout (MySQL, MariaDB) or `SQLITE_BUSY`, at `BEGIN`, in `body` or at `COMMIT`. It also runs
    /// the transaction again after an error that is due to the connection: another program has changed the schema, or
    /// the server does not accept writes any more, most often after a failover. The next attempt then gets another
    /// connection, and waits for up to [`acquire_timeout`](crate::Config::acquire_timeout) until a server accepts
    /// writes. Every other error is returned at once. Each attempt is a [`transaction`](Self::transaction) of its
    /// own: it begins, `body` runs, and `Ok` is committed. The error of the last attempt is returned as it is.
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
    /// # Ok(())
    /// # })?;
    /// # app.dispose()?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// **Tracked rows** expire before each attempt. Inside an attempt, `find`, `get` and `track` read from the
    /// database, and so do [`read`](crate::Tracked::read), [`write`](crate::Tracked::write) and `delete` of an older
    /// handle, once for each row. If such a row cannot be read at that moment, the handle gives the last known value,
    /// and the transaction is committed only if the row still has that value; otherwise the error is
    /// [`ErrorKind::Stale`](crate::ErrorKind::Stale).
    ///
    /// **What is repeated.** `body` sees a fresh session in each attempt. `body` itself must undo or repeat what it
    /// has done outside of the session. `body` may turn the failure into any error type: the session remembers that a
    /// statement of this transaction failed, even if the statement came from code that had the connection. A failure
    /// has been handled, and is no reason for another attempt, if a savepoint has undone it and `body` has sent
    /// another statement since. A panic is not repeated.
    ///
    /// **Between two attempts** the session holds no connection. It pauses for 5 to 10 ms before the second attempt,
    /// for twice as long before the next one, and so on up to 0.5 to 1 s. The exact pause is random, so that two
    /// transactions that were in conflict do not meet again. If the pause would end after the scope's deadline, there
    /// is no further attempt.
    ///
    /// **Not repeated** is [`ErrorKind::CommitUnknown`](crate::ErrorKind::CommitUnknown), because the work may have
    /// been committed and would be done twice. [`Retry::even_if_commit_unknown`] allows it, and [`Error::resolve`] may
    /// tell the outcome. [`ErrorKind::ConnectionLost`](crate::ErrorKind::ConnectionLost) is not repeated either: the
    /// program may call `retry` again. An `Err` that `body` makes itself is not repeated, whatever
    /// [`Error::is_transient`] says about it, because the database has not asked for it.
    ///
    /// **Hooks** of an attempt that is rolled back end with the attempt: its `after_rollback` hooks run, the others
    /// are dropped. Hooks that were registered before `retry` belong to the last attempt. If a `before_commit` hook
    /// is among them, an attempt whose commit fails is the last one, because such a hook can run only once.
    ///
    /// # Errors
    /// Those of `body`, and those of [`begin`](Self::begin) and [`commit`](Self::commit) turned into `E`.
    /// [`ErrorKind::NotRepeatable`](crate::ErrorKind::NotRepeatable) inside a closure of `transaction`, `savepoint` or
    /// another `retry`, and if the session has begun or has unflushed changes, because the earlier work could not be
    /// repeated.
    #[track_caller]
    pub fn retry<T, E: From<Error>>(
        &self,
        attempts: impl Into<Retry>,
        mut body: impl FnMut(&Self) -> Result<T, E>,
    ) -> Result<T, E> {
        let (at, retry, session) = (Location::caller(), attempts.into(), &*self.0);
        session.check_repeatable(at)?;
        let deadline = session.borrow_transaction(at)?.deadline_end();
        // The hooks that were registered before the call stay for every attempt.
        let mark = session.hooks.borrow().len();
        let commits_once = session.hooks.borrow().iter().any(|(event, _)| *event == HookEvent::BeforeCommit);
        let mut attempt = 0;
        loop {
            attempt += 1;
            let pause = pause_after(attempt);
            let may_repeat = || attempt < retry.attempts && deadline.is_none_or(|end| Instant::now() + pause < end);
            if let Err(error) = session.begin_attempt(at) {
                if !(may_repeat() && session.is_retryable(&error, retry)) {
                    if attempt > 1 {
                        // Errors of these hooks are logged.
                        let _ = run_after(false, session.take_hooks_since(0));
                    }
                    return Err(error.into());
                }
            } else {
                let scope = TransactionScope::open(session, "retry", at, false);
                session.with_unit(|unit| unit.state.begin_attempt());
                let outcome = body(self);
                let may_repeat = may_repeat();
                match outcome {
                    Ok(value) => {
                        scope.close();
                        let repeats = |error: &Error| may_repeat && !commits_once && session.is_retryable(error, retry);
                        match session.commit_with(at, |error| if repeats(error) { mark } else { 0 }) {
                            Ok(()) => return Ok(value),
                            Err(error) if repeats(&error) => {}
                            Err(error) => {
                                session.roll_back_after(&error, at);
                                return Err(session.with_undo(error).into());
                            }
                        }
                    }
                    Err(_) if may_repeat && session.has_transient_failure() => scope.close(),
                    Err(error) => return Err(error),
                }
                session.roll_back_at_end(mark, at);
                // A hook may have used the session.
                session.roll_back_at_end(usize::MAX, at);
            }
            let app = session.app().id();
            crate::wording::log_line!(
                debug,
                "diesel_session::session",
                "app `{app}`: attempt {attempt} of the `retry` at {at} is to be repeated in {pause:?}"
            );
            std::thread::sleep(pause);
        }
    }
}

impl<C: SessionConnection> SessionInner<C> {
    /// Begins an attempt. If the server has refused to write in an earlier attempt, the session waits until a server
    /// accepts writes, as long as a checkout may wait. Each question uses another connection, which may lead to another
    /// server.
    fn begin_attempt(&self, at: SourceLocation) -> Result<()> {
        self.begin(at)?;
        let mut transaction = self.borrow_transaction(at)?;
        let refused_write = std::mem::take(&mut transaction.refused_write);
        let Some(question) = self.kind().texts().is_read_only.filter(|_| refused_write) else { return Ok(()) };
        let end = Instant::now() + self.app().options().config.acquire_timeout;
        let end = transaction.deadline_end().map_or(end, |deadline| deadline.min(end));
        let mut pause = FIRST_PAUSE;
        while Instant::now() + pause < end
            && transaction.send(|conn| conn.texts(question)).is_ok_and(|rows| rows == [Some("on".to_owned())])
        {
            transaction.close_at_checkin();
            transaction.release();
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE_FOR_PRIMARY);
            transaction.begin(at)?;
        }
        Ok(())
    }

    /// Whether everything that the session has done so far would be done again by another attempt.
    fn check_repeatable(&self, at: SourceLocation) -> Result<()> {
        let scope = self.open_scopes.borrow().last().copied();
        let since = match scope {
            Some(scope) => Some(scope.at),
            // A second attempt would not find the changes that the first one has flushed.
            None => self.borrow_transaction(at)?.begun_at().or_else(|| self.unflushed_since()),
        };
        let inside = scope.map(|scope| scope.name);
        since.map_or(Ok(()), |since| Err(Details::NotRepeatable { inside, since, at }.into()))
    }

    /// Whether a statement of this transaction failed in a way that may succeed in another transaction.
    fn has_transient_failure(&self) -> bool {
        !self.has_guard.get()
            && self.transaction.try_borrow().is_ok_and(|transaction| transaction.history.has_transient_failure())
    }

    /// Whether the database asks for another attempt.
    fn is_retryable(&self, error: &Error, retry: Retry) -> bool {
        match error.details() {
            Details::Query { source, .. } => self.kind().is_transient(source),
            // The wait for other writers of this process.
            Details::LockTimeout { .. } => true,
            Details::RollbackRequired { .. } => self.has_transient_failure(),
            Details::CommitUnknown { .. } => retry.even_if_commit_unknown,
            _ => false,
        }
    }
}

fn pause_after(attempt: u32) -> Duration {
    let longest = 2_u32.checked_pow(attempt - 1).map_or(LONGEST_PAUSE, |factor| FIRST_PAUSE.saturating_mul(factor));
    let random = RandomState::new().hash_one(attempt) % 1000;
    longest.min(LONGEST_PAUSE).mul_f64(0.5 + 0.5 * random as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_pause_is_random_and_grows_to_a_second() {
        for (attempt, longest) in [(1, 10), (2, 20), (5, 160), (7, 640), (8, 1000), (40, 1000), (u32::MAX, 1000)] {
            let pauses: Vec<_> = (0..50).map(|_| pause_after(attempt)).collect();
            let longest = Duration::from_millis(longest);
            assert!(pauses.iter().all(|pause| *pause >= longest / 2 && *pause <= longest), "{attempt}: {pauses:?}");
            assert!(pauses.iter().any(|pause| *pause != pauses[0]), "{attempt}");
        }
    }
}
