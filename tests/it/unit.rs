//! The unit of work: what is kept, what is sent, and what its failures leave.

#[path = "unit/advice.rs"]
mod advice;
#[path = "unit/costs.rs"]
mod costs;
#[path = "unit/failures.rs"]
mod failures;
#[path = "unit/flushes.rs"]
mod flushes;
#[path = "unit/hooks.rs"]
mod hooks;
#[path = "unit/keys.rs"]
mod keys;
#[path = "unit/locks.rs"]
mod locks;
#[path = "unit/model.rs"]
mod model;
#[path = "unit/order.rs"]
mod order;
#[path = "unit/panics.rs"]
mod panics;
#[path = "unit/relations.rs"]
mod relations;
#[path = "unit/returned_rows.rs"]
mod returned_rows;
#[path = "unit/rows.rs"]
mod rows;
#[path = "unit/updates.rs"]
mod updates;
#[path = "unit/validity.rs"]
mod validity;

use super::*;
use crate::blog::*;

/// A test with the blog's tables.
#[track_caller]
fn blog(body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
    test_on(Fixture::sql("blog", tables(KIND)), body);
}

/// A context of its own.
#[track_caller]
fn inside(shop: &Shop<Conn>, body: impl FnOnce(&Session<Conn>) -> Result<()>) -> Result<()> {
    shop.context(|| body(&DB.session()?))
}

/// Runs one statement on another connection, and commits it.
#[track_caller]
fn elsewhere(shop: &Shop<Conn>, sql: &str) {
    assert!(shop.other_connection().write(sql), "{sql}");
}

#[track_caller]
fn titles(session: &Session<Conn>) -> Result<Vec<String>> {
    session.load(articles::table.order(articles::id).select(articles::title))
}

#[track_caller]
fn writers(session: &Session<Conn>) -> Result<Vec<String>> {
    session.load(writers::table.order(writers::id).select(writers::name))
}
