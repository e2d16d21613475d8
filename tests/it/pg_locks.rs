//! PostgreSQL's own locking reads.

use super::locks::changed_by_another;
use super::*;
use crate::blog::*;

#[test]
fn every_locking_clause_refreshes_a_tracked_row() {
    changed_by_another(|shop, session, row| {
        let query = || countries::table.find("nl").select(CountryName::as_select());
        let rename = |name: &str| {
            session.commit()?;
            session.find::<CountryName>("nl")?;
            assert!(shop.stranger().write(&format!("UPDATE countries SET name = '{name}'")));
            Ok::<_, Error>(())
        };
        session.track(query().for_share())?;
        assert_eq!(row.read().name, "theirs");
        rename("no key update")?;
        session.track(query().for_no_key_update())?;
        assert_eq!(row.read().name, "no key update");
        rename("key share")?;
        session.track(query().for_key_share().skip_locked())?;
        assert_eq!(row.read().name, "key share");
        rename("share")?;
        session.track(query().for_share().no_wait())?;
        assert_eq!(row.read().name, "share");
        session.commit()
    });
}
