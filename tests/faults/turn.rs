//! A schema operation waits for another for a minute, and then says for whose.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use diesel::backend::Backend;
use diesel::connection::BoxableConnection;
use diesel::migration::{self, Migration, MigrationMetadata, MigrationName, MigrationSource};
use diesel::prelude::*;
use diesel_session::{Database, Error};

use crate::fixtures::{Conn, Site, Speak, Step, step};
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

fn says_for_whose<C: Conn>(site: &Site) {
    let (tell, told) = channel();
    let (end, ended) = channel();
    let db = Database::<C, _>::new(Source(Arc::new(Signs(Mutex::new((tell, ended))))));
    let slow = db.init_app("slow", site.config()).unwrap();
    let impatient = C::app(site.config());
    thread::scope(|scope| {
        let end: Sender<()> = end;
        let slow = &slow;
        let line = line!() + 1;
        let creating = scope.spawn(move || slow.create_all());
        told.recv().unwrap();
        let session = slow.status().holders[0].session();
        let error = impatient.create_all().unwrap_err();
        drop(end);
        let Error::LockTimeout { operation: "create_all", blockers, .. } = &error else { panic!("{error}") };
        assert_eq!(blockers.len(), 1, "{error}");
        assert!(session.is_some() && blockers[0].session == session, "{error}");
        let holder = blockers[0].holder.as_ref().unwrap();
        assert_eq!((holder.app(), holder.place().line()), ("slow", line), "{error}");
        assert_eq!(creating.join().unwrap().unwrap(), ["1"]);
    });
    assert_eq!(slow.open_session().unwrap().number("SELECT count(*) AS number FROM one").unwrap(), 0);
    db.dispose_all().unwrap();
}

/// On both servers at once: it takes a minute.
#[test]
fn a_minute_is_enough() {
    thread::scope(|scope| {
        let postgres = enabled(Kind::Postgres).then(Site::postgres);
        let mysql = enabled(Kind::Mysql).then(Site::mysql);
        if let Some(site) = postgres {
            scope.spawn(move || says_for_whose::<PgConnection>(&site));
        }
        if let Some(site) = mysql {
            scope.spawn(move || says_for_whose::<MysqlConnection>(&site));
        }
    });
}
