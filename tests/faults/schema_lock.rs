//! A schema operation waits a minute for another one, and then names the session of the other one.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use diesel::backend::Backend;
use diesel::connection::BoxableConnection;
use diesel::migration::{self, Migration, MigrationMetadata, MigrationName, MigrationSource};
use diesel::prelude::*;
use diesel_session::{Database, ErrorKind};

use crate::fixtures::{SessionExt, Step, TestConnection, TestDatabase, step};
use crate::support::{Kind, enabled};

/// Tells that it runs, and goes on when it is told to.
struct Slow {
    step: Step,
    signs: Arc<Signs>,
}

struct Signs(Mutex<(Sender<()>, Receiver<()>)>);

impl<DB: Backend> Migration<DB> for Slow {
    fn run(&self, conn: &mut dyn BoxableConnection<DB>) -> migration::Result<()> {
        let signs = self.signs.0.lock().unwrap();
        signs.0.send(())?;
        let _ = signs.1.recv();
        Migration::<DB>::run(&self.step, conn)
    }

    fn revert(&self, conn: &mut dyn BoxableConnection<DB>) -> migration::Result<()> {
        Migration::<DB>::revert(&self.step, conn)
    }

    fn metadata(&self) -> &dyn MigrationMetadata {
        Migration::<DB>::metadata(&self.step)
    }

    fn name(&self) -> &dyn MigrationName {
        Migration::<DB>::name(&self.step)
    }
}

struct Source(Arc<Signs>);

impl<DB: Backend> MigrationSource<DB> for Source {
    fn migrations(&self) -> migration::Result<Vec<Box<dyn Migration<DB>>>> {
        let step = step("1", "CREATE TABLE one (id INTEGER)", "DROP TABLE one");
        Ok(vec![Box::new(Slow { step, signs: Arc::clone(&self.0) })])
    }
}

fn assert_schema_operation_names_the_lock_holder<C: TestConnection>(test_db: &TestDatabase) {
    let (tell, told) = channel();
    let (end, ended) = channel();
    let db = Database::<C, _>::new(Source(Arc::new(Signs(Mutex::new((tell, ended))))));
    let slow = db.init_app("slow", test_db.config()).unwrap();
    let impatient = C::app(test_db.config());
    thread::scope(|scope| {
        let end: Sender<()> = end;
        let slow = &slow;
        let line = line!() + 1;
        let creating = scope.spawn(move || slow.create_all());
        told.recv().unwrap();
        let session = slow.status().holders[0].session();
        let error = impatient.create_all().unwrap_err();
        drop(end);
        assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error}");
        assert!(error.to_string().contains("create_all"), "{error}");
        let blockers = error.blockers().expect("blockers");
        assert_eq!(blockers.len(), 1, "{error}");
        assert!(session.is_some() && blockers[0].session == session, "{error}");
        let holder = blockers[0].holder.as_ref().unwrap();
        assert_eq!((holder.app(), holder.location().line()), ("slow", line), "{error}");
        assert_eq!(creating.join().unwrap().unwrap(), ["1"]);
    });
    assert_eq!(slow.open_session().unwrap().number("SELECT count(*) AS number FROM one").unwrap(), 0);
    db.dispose_all().unwrap();
}

/// On both servers at once: it takes a minute.
#[test]
fn schema_operation_times_out_after_a_minute_and_names_the_lock_holder() {
    thread::scope(|scope| {
        let postgres = enabled(Kind::Postgres).then(TestDatabase::postgres);
        let mysql = enabled(Kind::Mariadb).then(TestDatabase::mariadb);
        if let Some(test_db) = postgres {
            scope.spawn(move || assert_schema_operation_names_the_lock_holder::<PgConnection>(&test_db));
        }
        if let Some(test_db) = mysql {
            scope.spawn(move || assert_schema_operation_names_the_lock_holder::<MysqlConnection>(&test_db));
        }
    });
}
