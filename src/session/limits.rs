//! The deadline of a scope: the limits that the session sets on the server, and the watch over driver calls.

use std::time::{Duration, Instant};

use super::transaction_state::TransactionState;
use crate::connection::SessionConnection;
use crate::dialect::BeginOptions;
use crate::error::{Details, Result, SourceLocation};
use crate::kind::DatabaseKind;
use crate::pool::{CallDeadline, GRACE};
use crate::settings::{Deadline, Settings};

/// The minimum and the maximum by which the limit that was sent last may exceed the remaining time.
const LIMIT_SLACK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));

impl<C: SessionConnection> TransactionState<C> {
    #[inline]
    pub(super) fn check_deadline(&self, at: SourceLocation) -> Result<()> {
        match self.settings.deadline {
            Some(Deadline { end, limit }) if Instant::now() >= end => {
                Err(Details::DeadlineExceeded { limit, at }.into())
            }
            _ => Ok(()),
        }
    }

    /// Sends the remaining time, if there is a deadline, to the database as the new limit, unless the present limit
    /// fits.
    #[inline]
    pub(super) fn renew_limit(&mut self, at: SourceLocation) -> Result<()> {
        match self.remaining() {
            Some(remaining) => self.renew_limit_to(remaining, at),
            None => Ok(()),
        }
    }

    fn renew_limit_to(&mut self, remaining: Duration, at: SourceLocation) -> Result<()> {
        let slack = (remaining / 10).clamp(LIMIT_SLACK.0, LIMIT_SLACK.1);
        if self.limit_sent.is_some_and(|sent| sent >= remaining && sent - remaining <= slack) {
            return Ok(());
        }
        let is_local = self.is_limit_local();
        // A limit that stays on the connection should fit the first read of the next scope with this deadline too.
        let limit = if self.keeps_limit() && !is_local { self.at_most(remaining + slack / 2) } else { remaining };
        let sql = self.kind().limit(limit, self.has_begun(), &self.app.options().config);
        self.note_limit(limit, is_local);
        self.send_own(at, |conn| conn.batch_execute(&sql))
    }

    /// Renews the limit before a `BEGIN` or `COMMIT`, which may wait for the lock of the whole database.
    pub(super) fn renew_busy_timeout(&mut self, at: SourceLocation) -> Result<()> {
        if self.kind().has_one_writer() { self.renew_limit(at) } else { Ok(()) }
    }

    /// Whether the next limit ends with the transaction.
    fn is_limit_local(&self) -> bool {
        self.kind() == DatabaseKind::Postgres && self.has_begun() && !self.style().is_nested()
    }

    /// Whether a limit stays on the server session when the connection is checked in. The next checkout restores the
    /// limit of the connection, unless its holder has a deadline too. So a read with a deadline is one round trip most
    /// of the time. The hooks of the pool must not run under the limit of a scope.
    fn keeps_limit(&self) -> bool {
        let options = self.app.options();
        self.kind().can_go_stale()
            && !self.style().is_nested()
            && options.on_checkin.is_none()
            && options.on_checkout.is_none()
            && options.on_close.is_none()
    }

    fn note_limit(&mut self, limit: Duration, is_local: bool) {
        self.limit_sent = Some(limit);
        if let Some(managed) = self.managed().filter(|_| !is_local) {
            managed.limit = Some(limit);
        }
    }

    /// Notes the limit that was sent with the `BEGIN`, if there was one. SQLite has its limit since before.
    pub(super) fn note_limit_of_begin(&mut self, limit: Option<Duration>) {
        if let Some(limit) = limit.filter(|_| self.kind().can_go_stale()) {
            self.note_limit(limit, self.is_limit_local());
        }
    }

    /// Restores the limit of the connection before it is checked in. A local limit has ended with the transaction.
    #[inline]
    pub(super) fn release_limit(&mut self) {
        self.limit_sent = None;
        if self.managed().is_some_and(|managed| managed.limit.is_some()) && !self.keeps_limit() {
            self.restore_limit();
        }
    }

    fn restore_limit(&mut self) {
        let Some(managed) = self.managed() else { return };
        managed.limit = None;
        if let Some(sql) = managed.sql_restoring_limit() {
            self.send_restoring(&sql);
        }
    }

    /// The time until the deadline. A server gets at most the application's `statement_timeout`.
    #[inline]
    pub(super) fn remaining(&self) -> Option<Duration> {
        Some(self.at_most(self.deadline_end()?.saturating_duration_since(Instant::now())))
    }

    fn at_most(&self, limit: Duration) -> Duration {
        let most = self.app.options().config.statement_timeout.filter(|_| self.kind() != DatabaseKind::Sqlite);
        most.map_or(limit, |most| most.min(limit))
    }

    #[inline]
    pub(super) fn deadline_end(&self) -> Option<Instant> {
        self.settings.deadline.map(|deadline| deadline.end)
    }

    /// Whether a limit holds for the transaction, because the session of the server may belong to another client after
    /// it.
    #[inline]
    pub(super) fn has_limit_of_transaction(&self) -> bool {
        let options = self.app.options();
        options.shares_sessions()
            && (self.settings.deadline.is_some()
                || options.config.statement_timeout.is_some()
                || options.config.lock_timeout.is_some())
    }

    /// The options with which the transaction begins.
    pub(super) fn begin_options(&self) -> BeginOptions {
        let Settings { mode, isolation, .. } = self.settings;
        let options = self.app.options();
        // The other connections have these limits from their setup.
        let config = options.shares_sessions().then_some(&options.config);
        let remaining = self.remaining().or(config.and_then(|config| config.statement_timeout));
        BeginOptions { mode, isolation, remaining, lock_timeout: config.and_then(|config| config.lock_timeout) }
    }

    /// Has the connection cut if the driver call that follows exceeds both the scope's deadline and the limit of the
    /// server by [`GRACE`].
    #[inline]
    pub(super) fn start_watchdog(&mut self) -> Option<CallDeadline> {
        self.settings.deadline.and_then(|deadline| self.watch(deadline))
    }

    fn watch(&mut self, deadline: Deadline) -> Option<CallDeadline> {
        let socket = self.managed()?.socket?;
        let now = Instant::now();
        let by_server = self.limit_sent.and_then(|limit| now.checked_add(limit)).unwrap_or(now);
        let end = deadline.end.max(now).max(by_server.min(deadline.end.checked_add(LIMIT_SLACK.1)?));
        Some(CallDeadline::begin(socket, end.checked_add(GRACE)?))
    }

    /// Ends what [`start_watchdog`](Self::start_watchdog) began, after the driver call. If the connection was cut,
    /// the transaction is lost.
    #[inline]
    pub(super) fn stop_watchdog(&mut self, watchdog: Option<CallDeadline>) {
        if let Some(watchdog) = watchdog {
            self.end_watch(watchdog);
        }
    }

    fn end_watch(&mut self, watchdog: CallDeadline) {
        if !watchdog.was_cut() {
            return;
        }
        let Some(managed) = self.managed() else { return };
        (managed.was_cut, managed.lost, managed.closes_at_checkin) = (true, true, true);
        if self.has_begun() {
            self.invalidate("its connection was closed at the scope's deadline".into(), self.last_call(), true);
        }
    }
}
