//! The errors of callers that get no connection.

use std::time::Duration;

use diesel::prelude::*;
use diesel::result::ConnectionResult;

use crate::error::Details;
use crate::{Config, Database};

const PATIENCE: Duration = Duration::from_millis(200);

fn connect_slowly(url: &str) -> ConnectionResult<SqliteConnection> {
    // Longer than both callers wait.
    std::thread::sleep(6 * PATIENCE);
    SqliteConnection::establish(url)
}

#[test]
fn connect_timeout_reports_the_callers_own_wait() {
    static DB: Database<SqliteConnection> = Database::without_migrations().connect_with(connect_slowly);
    let app = DB.init_app("slow", Config::new(":memory:").acquire_timeout(PATIENCE)).expect("a new name");
    let refused = || app.ping().expect_err("it takes longer to connect");
    let first = refused();
    let Details::ConnectTimeout { waited, connecting: None, .. } = first.details() else { panic!("{first}") };
    assert!(*waited >= PATIENCE, "{first}");
    // The second call waits for the connect that the first call has started.
    let second = refused();
    let Details::ConnectTimeout { waited, connecting: Some(age), .. } = second.details() else { panic!("{second}") };
    assert!(*waited >= PATIENCE && *age >= 2 * PATIENCE && waited < age, "{second}");
    let expected = format!("The connect that this call waited for had been under way for {age:.3?}.");
    assert!(second.to_string().contains(&expected), "{second}");
    app.dispose().expect("nothing is in use");
}
