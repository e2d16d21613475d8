//! What many rows cost, and which rows are let go of.

use std::rc::{Rc, Weak};

use diesel_session::Tracked;

use super::*;

/// As many writers as that, committed.
fn crowd(shop: &Shop<Conn>, rows: usize) -> Result<()> {
    inside(shop, |session| {
        (0..rows).try_for_each(|row| session.add(writer(&format!("w{row}"))).map(drop))?;
        session.commit()
    })
}

diesel::table! { counted (id) { id -> Integer, note -> Text, } }

/// Text of which the living are counted.
#[derive(Debug, Clone, diesel::deserialize::FromSqlRow, diesel::expression::AsExpression)]
#[diesel(sql_type = Text)]
pub struct Alive(String, Rc<()>);

thread_local! {
    static ALIVE: Rc<()> = Rc::new(());
}

fn alive() -> usize {
    ALIVE.with(|alive| Rc::strong_count(alive) - 1)
}

impl PartialEq for Alive {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl<DB: diesel::backend::Backend> diesel::serialize::ToSql<Text, DB> for Alive
where
    String: diesel::serialize::ToSql<Text, DB>,
{
    fn to_sql<'b>(&'b self, out: &mut diesel::serialize::Output<'b, '_, DB>) -> diesel::serialize::Result {
        self.0.to_sql(out)
    }
}

impl<DB: diesel::backend::Backend> diesel::deserialize::FromSql<Text, DB> for Alive
where
    String: diesel::deserialize::FromSql<Text, DB>,
{
    fn from_sql(bytes: DB::RawValue<'_>) -> diesel::deserialize::Result<Self> {
        Ok(Self(String::from_sql(bytes)?, ALIVE.with(Rc::clone)))
    }
}

#[derive(Debug, Clone, Queryable, Selectable, diesel_session::Entity)]
#[diesel(table_name = counted)]
#[entity(connection = AnyConnection)]
pub struct Counted {
    pub id: i32,
    pub note: Alive,
}

#[test]
fn rounds_that_end_with_a_rollback_do_not_grow() {
    blog(|shop| {
        elsewhere(shop, "CREATE TABLE counted (id INTEGER PRIMARY KEY, note VARCHAR(100) NOT NULL)");
        for chunk in (0..20_000).collect::<Vec<i32>>().chunks(1000) {
            let rows: Vec<String> = chunk.iter().map(|id| format!("({id}, 'note')")).collect();
            elsewhere(shop, &format!("INSERT INTO counted VALUES {}", rows.join(", ")));
        }
        inside(shop, |session| {
            let kept = session.find::<Counted>(0)?;
            let mut most = 0;
            for round in 0..20 {
                let range = round * 1000..(round + 1) * 1000;
                session.track::<Counted>(
                    counted::table.filter(counted::id.ge(range.start).and(counted::id.lt(range.end))),
                )?;
                most = most.max(alive());
                session.rollback()?;
            }
            assert!(most < 5000, "{most} rows at once");
            assert_eq!(session.find::<Counted>(0)?, kept, "a row with a handle stays");
            Ok(())
        })
    });
}

/// So many rows that visiting all of them for each of them takes minutes.
const MANY: usize = 30_000;

#[test]
fn expiring_refusing_and_expunging_one_by_one_is_linear() {
    blog(|shop| {
        crowd(shop, MANY)?;
        inside(shop, |session| {
            let all: Vec<Tracked<Writer>> = session.track::<Writer>(writers::table)?;
            let write = || all.iter().for_each(|writer| writer.write().email = Some("written".into()));
            write();
            assert_eq!(session.dirty().len(), MANY);
            all.iter().try_for_each(|writer| session.expire(writer))?;
            assert!(!session.is_dirty());
            write();
            all.iter().try_for_each(|writer| session.delete(writer))?;
            all.iter().rev().try_for_each(|writer| session.expunge(writer))?;
            assert!(!session.is_dirty());
            let new: Vec<_> = (0..MANY).map(|row| session.add(writer(&format!("new {row}")))).collect::<Result<_>>()?;
            new.iter().rev().try_for_each(|writer| session.delete(writer))?;
            assert!(!session.is_dirty());
            session.commit()
        })
    });
}

#[test]
fn order_of_writes_survives_what_is_taken_back() {
    blog(|shop| {
        crowd(shop, 5)?;
        inside(shop, |session| {
            let all: Vec<Tracked<Writer>> = session.track::<Writer>(writers::table.order(writers::id))?;
            all.iter().for_each(|writer| writer.write().email = Some("1".into()));
            session.expire(&all[1])?;
            all[1].write().email = Some("2".into());
            let order: Vec<String> =
                session.dirty().of::<Writer>().map(|(_, writer)| writer.read().name.clone()).collect();
            assert_eq!(order, ["w0", "w2", "w3", "w4", "w1"]);
            let new: Vec<_> =
                ["a", "b", "c"].into_iter().map(|name| session.add(writer(name))).collect::<Result<_>>()?;
            session.delete(&new[1])?;
            session.commit()?;
            assert!(new[0].read().id < new[2].read().id);
            Ok(())
        })
    });
}

#[test]
fn nothing_of_a_context_is_left_when_its_handles_are_gone() {
    blog(|shop| {
        let weak: Weak<()> = inside_and_out(shop)?;
        assert!(weak.upgrade().is_none());
        Ok(())
    });
}

/// A hook that owns something keeps it no longer than the context.
fn inside_and_out(shop: &Shop<Conn>) -> Result<Weak<()>> {
    shop.context(|| {
        let session = DB.session()?;
        let owned = Rc::new(());
        let weak = Rc::downgrade(&owned);
        session.before_flush(move |_, _| drop(Rc::clone(&owned)))?;
        session.add(writer("Ada"))?.key();
        session.flush()?;
        Ok(weak)
    })
}
