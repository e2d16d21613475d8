//! The use of a connection by code of the program, outside of any session. The connection may move from thread to
//! thread.
//!
//! In an outer transaction the use is a savepoint. Otherwise the code finds no transaction, and a transaction that it
//! leaves open is rolled back.

use std::sync::Arc;

use diesel::result::QueryResult;

use super::admission::CheckoutGuard;
use super::connections::Connections;
use super::managed::Managed;
use super::statement_observer::{ObservedEffects, SqlSource};
use crate::connection::SessionConnection;
use crate::dialect::BeginOptions;
use crate::error::{Error, Result, SourceLocation};
use crate::kind::DatabaseKind;

impl<C: SessionConnection> CheckoutGuard<Connections<C>> {
    /// Gives the connection to code of the program.
    pub(crate) fn begin_program_use(&mut self, at: SourceLocation) -> Result<()> {
        let managed = self.managed();
        let style = managed.style().clone();
        if let Some(outer) = style.outer()
            && let Err(error) = outer.begin(managed.conn_mut(), BeginOptions::plain(), None)
        {
            managed.closes_at_checkin = true;
            return Err(Error::from_query(error, at));
        }
        managed.observer.take();
        managed.observer.read_statements(SqlSource::Raw);
        managed.observer.set_checked_out_at(Some(at));
        self.note_movable();
        Ok(())
    }

    /// Takes the connection back from code of the program. The caller then checks it in.
    pub(crate) fn end_program_use(&mut self, at: SourceLocation) {
        if self.is_inherited() {
            return;
        }
        let pool = Arc::clone(&self.pool);
        let (storage, end) = (&pool.storage, pool.storage.call_deadline(self.checkin_deadline));
        let kind = storage.kind();
        let panicked = std::thread::panicking();
        let managed = self.managed();
        managed.observer.stop_reading();
        managed.observer.set_checked_out_at(None);
        let is_observed = managed.is_observed();
        let effects = managed.observer.take();
        if let Some(poison) = effects.poison {
            managed.retire(poison);
        }
        managed.lost |= effects.lost;
        managed.closes_at_checkin |= !is_observed || effects.lost;
        let warn = |what: &str| {
            let app = &storage.options.app;
            log_pool!(warn, "app `{app}`: the connection that was checked out at {at} came back {what}");
        };
        let style = managed.style().clone();
        if let Some(outer) = style.outer() {
            if !managed.closes_at_checkin {
                match outer.end_program_use(managed, &effects, !panicked) {
                    Ok(true) => {}
                    Ok(false) => warn("after an error or with an open transaction, so its work is undone"),
                    Err(cause) => outer.invalidate(cause, Some(at)),
                }
                managed.observer.take();
            }
            return;
        }
        managed.closes_at_checkin |= panicked;
        if managed.closes_at_checkin {
            return;
        }
        let rolled_back =
            storage.call(managed, end, "was not rolled back in time", |managed| roll_back(kind, managed, &effects));
        managed.observer.take();
        match rolled_back {
            Some(Ok(false)) | None => {}
            Some(Ok(true)) => warn("with an open transaction, which is rolled back"),
            Some(Err(_)) => {
                managed.closes_at_checkin = true;
                warn("with an open transaction that could not be rolled back, so it is closed");
            }
        }
    }
}

/// Rolls back the transaction that the program has left open. Returns whether there was an open transaction.
fn roll_back<C: SessionConnection>(
    kind: DatabaseKind,
    managed: &mut Managed<C>,
    effects: &ObservedEffects,
) -> QueryResult<bool> {
    let levels = managed.conn_mut().depth();
    managed.roll_back_levels(0)?;
    if levels != Some(0) {
        return Ok(true);
    }
    // Diesel does not know of a raw `BEGIN`.
    let may_be_open = effects.began || effects.set_savepoint || effects.may_have_ended.is_some();
    if !may_be_open && kind != DatabaseKind::Sqlite {
        return Ok(false);
    }
    managed.suppressed(|conn| {
        let open = kind.dialect().may_be_in_transaction(conn);
        if open {
            conn.batch_execute("ROLLBACK")?;
        }
        Ok(open)
    })
}
