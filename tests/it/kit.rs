//! The test kit, used on itself.

#[path = "kit/attribute.rs"]
mod attribute;
#[path = "kit/connection_slots.rs"]
mod connection_slots;
#[path = "kit/edge_cases.rs"]
mod edge_cases;
#[path = "kit/isolation.rs"]
mod isolation;
#[path = "kit/rollback.rs"]
mod rollback;
#[path = "kit/schema_changes.rs"]
mod schema_changes;

#[path = "kit/leftovers.rs"]
mod leftovers;

use std::sync::Arc;

use diesel_session::pool::AppEnd;
use diesel_session::testing::{Fixture, TestApp, TestIsolation, TestSetup};
use diesel_session::{Config, Error, Result, Session};

use crate::fixtures::{AnyConnection, COUNT, INSERT, ServerUrl, SessionExt, TestConnection, TestDatabase};
use crate::for_each_database;
use crate::support;
use diesel::PgConnection;

/// The isolations that a kind of database offers, each with the configuration of its server.
struct Isolations(Vec<(Config, TestIsolation)>);

impl Isolations {
    fn postgres() -> Self {
        use TestIsolation::{Database, Rollback, Schema};
        Self::of(&support::postgres().url(), &[Database, Schema, Rollback])
    }

    fn mariadb() -> Self {
        Self::of(&support::mariadb().url(), &[TestIsolation::Database, TestIsolation::Rollback])
    }

    fn sqlite() -> Self {
        let mut all = Self::of(":memory:", &[TestIsolation::Database, TestIsolation::Rollback]);
        all.0.push((Config::new("somewhere.sqlite"), TestIsolation::Database));
        all
    }

    fn of(url: &str, isolations: &[TestIsolation]) -> Self {
        Self(isolations.iter().map(|isolation| (Config::new(url), *isolation)).collect())
    }
}

#[track_caller]
fn begin<C: TestConnection>((config, isolation): &(Config, TestIsolation)) -> TestApp<C> {
    TestSetup::of(C::db()).config(config.clone()).isolation(*isolation).start().unwrap()
}

#[track_caller]
fn committed<C: TestConnection>(test: &TestApp<C>) -> i64 {
    let session = test.open_session().unwrap();
    session.number(COUNT).unwrap()
}
