//! Relations over types that a session has not used, and rows that a cascade has deleted.

use diesel_session::Entity;

use diesel_session::unit_of_work::RowState;

use super::*;

diesel::table! { owners (id) { id -> Integer, name -> Text, } }
diesel::table! { albums (id) { id -> Integer, owner_id -> Integer, name -> Text, } }
diesel::table! { photos (id) { id -> Integer, album_id -> Integer, name -> Text, } }
diesel::table! { folders (id) { id -> Integer, parent_id -> Nullable<Integer>, name -> Text, } }
diesel::table! { notes (id) { id -> Integer, owner_id -> Nullable<Integer>, name -> Text, version -> Integer, } }
diesel::table! { rooms (house, number) { house -> Integer, number -> Integer, name -> Text, } }
diesel::table! { beds (id) { id -> Integer, house -> Integer, room -> Nullable<Integer>, name -> Text, } }

#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[entity(new = NewOwner, connection = AnyConnection)]
pub struct Owner {
    pub id: i32,
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[entity(new = NewAlbum, connection = AnyConnection)]
pub struct Album {
    pub id: i32,
    #[entity(references = Owner)]
    pub owner_id: i32,
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[entity(new = NewPhoto, connection = AnyConnection)]
pub struct Photo {
    pub id: i32,
    #[entity(references = Album)]
    pub album_id: i32,
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[entity(new = NewFolder, connection = AnyConnection)]
pub struct Folder {
    pub id: i32,
    #[entity(references = Folder)]
    pub parent_id: Option<i32>,
    pub name: String,
}

/// A row that loses its parent and stays.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[entity(new = NewNote, connection = AnyConnection)]
pub struct Note {
    pub id: i32,
    #[entity(references = Owner)]
    pub owner_id: Option<i32>,
    pub name: String,
    #[entity(version)]
    pub version: i32,
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[diesel(primary_key(house, number))]
#[entity(new = NewRoom, connection = AnyConnection)]
pub struct Room {
    pub house: i32,
    pub number: i32,
    pub name: String,
}

/// A foreign key of two columns.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[entity(new = NewBed, connection = AnyConnection, references(Room, columns = (house, room)))]
pub struct Bed {
    pub id: i32,
    pub house: i32,
    pub room: Option<i32>,
    pub name: String,
}

const TABLES: &str = "
    CREATE TABLE owners (id INTEGER PRIMARY KEY, name VARCHAR(50) NOT NULL UNIQUE);
    CREATE TABLE albums (id INTEGER PRIMARY KEY, owner_id INTEGER NOT NULL, name VARCHAR(50) NOT NULL UNIQUE,
        FOREIGN KEY (owner_id) REFERENCES owners (id) ON DELETE CASCADE);
    CREATE TABLE photos (id INTEGER PRIMARY KEY, album_id INTEGER NOT NULL, name VARCHAR(50) NOT NULL,
        FOREIGN KEY (album_id) REFERENCES albums (id) ON DELETE CASCADE);
    CREATE TABLE folders (id INTEGER PRIMARY KEY, parent_id INTEGER, name VARCHAR(50) NOT NULL UNIQUE,
        FOREIGN KEY (parent_id) REFERENCES folders (id) ON DELETE CASCADE);
    CREATE TABLE notes (id INTEGER PRIMARY KEY, owner_id INTEGER, name VARCHAR(50) NOT NULL, version INTEGER NOT NULL DEFAULT 1,
        FOREIGN KEY (owner_id) REFERENCES owners (id) ON DELETE SET NULL);
    CREATE TABLE rooms (house INTEGER NOT NULL, number INTEGER NOT NULL, name VARCHAR(50) NOT NULL UNIQUE, PRIMARY KEY (house, number));
    CREATE TABLE beds (id INTEGER PRIMARY KEY, house INTEGER NOT NULL, room INTEGER, name VARCHAR(50) NOT NULL,
        FOREIGN KEY (house, room) REFERENCES rooms (house, number) ON DELETE CASCADE);
    INSERT INTO owners VALUES (1, 'Ada'), (2, 'Bob');
    INSERT INTO albums VALUES (1, 1, 'sea'), (2, 2, 'hills');
    INSERT INTO photos VALUES (1, 1, 'waves'), (2, 2, 'trees');
    INSERT INTO folders VALUES (1, NULL, 'root'), (2, 1, 'middle'), (3, 2, 'leaf'), (4, NULL, 'other');
    INSERT INTO notes VALUES (1, 1, 'note', 1);
    INSERT INTO rooms VALUES (1, 1, 'blue'), (1, 2, 'red');
    INSERT INTO beds VALUES (1, 1, 1, 'wide'), (2, 1, NULL, 'lost');";

#[track_caller]
fn gallery(body: impl Fn(&Shop<Conn>) -> Result<()>) {
    test_on(Fixture::sql("gallery", TABLES), |shop| body(shop));
}

fn ids(shop: &Shop<Conn>, table: &str) -> Vec<String> {
    shop.ask(&format!("SELECT CAST(id AS CHAR(10)) AS value FROM {table} ORDER BY id"))
        .into_iter()
        .map(|id| id.trim().to_owned())
        .collect()
}

#[test]
fn delete_expires_grandchildren_whose_parents_the_session_has_not_used() {
    gallery(|shop| {
        inside(shop, |session| {
            let photo = session.find::<Photo>(1)?;
            let other = session.find::<Photo>(2)?;
            let ada = session.find::<Owner>(1)?;
            session.delete(&ada)?;
            session.flush()?;
            assert_eq!(session.get::<Photo>(1)?, None);
            assert_eq!((photo.state(), session.get::<Photo>(2)?), (RowState::Deleted, Some(other)));
            session.commit()
        })?;
        assert_eq!(ids(shop, "photos"), ["2"]);
        Ok(())
    });
}

#[test]
fn delete_of_a_row_and_its_grandparent_does_not_depend_on_the_order_of_use() {
    for photo_first in [false, true] {
        for deleted_first in [false, true] {
            gallery(|shop| {
                inside(shop, |session| {
                    let (photo, ada) = if photo_first {
                        let photo = session.find::<Photo>(1)?;
                        (photo, session.find::<Owner>(1)?)
                    } else {
                        let ada = session.find::<Owner>(1)?;
                        (session.find::<Photo>(1)?, ada)
                    };
                    if deleted_first {
                        session.delete(&photo)?;
                        session.delete(&ada)?;
                    } else {
                        session.delete(&ada)?;
                        session.delete(&photo)?;
                    }
                    session.commit()?;
                    assert_eq!([photo.state(), ada.state()], [RowState::Deleted; 2]);
                    Ok(())
                })?;
                assert_eq!((ids(shop, "owners"), ids(shop, "photos")), (vec!["2".into()], vec!["2".into()]));
                Ok(())
            });
        }
    }
}

#[test]
fn delete_of_a_row_that_a_cascade_has_deleted_is_no_error() {
    gallery(|shop| {
        inside(shop, |session| {
            // In one flush, with a row between them that the session does not know.
            let (root, leaf) = (session.find::<Folder>(1)?, session.find::<Folder>(3)?);
            session.delete(&root)?;
            session.delete(&leaf)?;
            session.flush()?;
            assert_eq!([root.state(), leaf.state()], [RowState::Deleted; 2]);
            // In a later flush of the transaction.
            let (photo, ada) = (session.find::<Photo>(1)?, session.find::<Owner>(1)?);
            session.delete(&ada)?;
            session.flush()?;
            session.delete(&photo)?;
            session.commit()?;
            assert_eq!(photo.state(), RowState::Deleted);
            Ok(())
        })?;
        assert_eq!((ids(shop, "folders"), ids(shop, "photos")), (vec!["4".into()], vec!["2".into()]));
        Ok(())
    });
}

#[test]
fn delete_of_a_row_deleted_by_another_program_stays_stale() {
    gallery(|shop| {
        inside(shop, |session| {
            let (photo, bob) = (session.find::<Photo>(1)?, session.find::<Owner>(2)?);
            session.commit()?;
            elsewhere(shop, "DELETE FROM photos WHERE id = 1");
            session.delete(&photo)?;
            assert_is!(session.flush(), Err(error) if error.kind() == ErrorKind::Stale && error.to_string().contains("so its delete at "));
            session.rollback()?;
            // A deletion that was undone explains nothing.
            let undone = session.savepoint(|session| {
                session.delete(&bob)?;
                session.flush()?;
                Err::<(), Error>(Error::from(diesel::result::Error::NotFound))
            });
            assert!(undone.is_err());
            session.delete(&photo)?;
            assert_is!(session.flush(), Err(error) if error.kind() == ErrorKind::Stale && error.to_string().contains("so its delete at "));
            session.rollback()
        })
    });
}

#[test]
fn delete_that_finds_a_newer_version_is_stale_after_a_cascade_as_well() {
    gallery(|shop| {
        inside(shop, |session| {
            let (note, bob) = (session.find::<Note>(1)?, session.find::<Owner>(2)?);
            session.commit()?;
            elsewhere(shop, "UPDATE notes SET version = 7");
            session.delete(&bob)?;
            session.flush()?;
            session.delete(&note)?;
            assert_is!(session.flush(), Err(error) if error.kind() == ErrorKind::Stale && error.entity() == Some("Note"));
            session.rollback()
        })?;
        assert_eq!((ids(shop, "owners").len(), ids(shop, "notes").len()), (2, 1));
        Ok(())
    });
}

#[test]
fn update_of_a_row_that_a_cascade_deletes_is_no_error() {
    gallery(|shop| {
        inside(shop, |session| {
            let (photo, ada) = (session.find::<Photo>(1)?, session.find::<Owner>(1)?);
            photo.write().name = "new".into();
            session.delete(&ada)?;
            // A new row that wants the deleted one's name makes the DELETE the first statement.
            session.add(NewOwner { id: 3, name: "Ada".into() })?;
            session.commit()?;
            assert_eq!((session.get::<Photo>(1)?, photo.state()), (None, RowState::Deleted));
            Ok(())
        })?;
        assert_eq!((ids(shop, "owners"), ids(shop, "photos")), (vec!["2".into(), "3".into()], vec!["2".into()]));
        Ok(())
    });
}

#[test]
fn update_of_a_row_whose_foreign_key_is_set_to_null_is_sent() {
    gallery(|shop| {
        inside(shop, |session| {
            let (note, ada) = (session.find::<Note>(1)?, session.find::<Owner>(1)?);
            note.write().name = "kept".into();
            session.delete(&ada)?;
            session.add(NewOwner { id: 3, name: "Ada".into() })?;
            session.flush()?;
            let again = session.find::<Note>(1)?;
            assert_eq!(again, note);
            assert_eq!((again.read().owner_id, again.read().name.as_str()), (None, "kept"));
            again.write().owner_id = Some(3);
            session.commit()
        })?;
        assert_eq!(shop.ask("SELECT name AS value FROM notes WHERE owner_id = 3"), ["kept"]);
        Ok(())
    });
}

#[test]
fn a_row_that_is_moved_away_from_a_deleted_tree_survives() {
    for known in [false, true] {
        gallery(|shop| {
            inside(shop, |session| {
                // `middle`, between the two, is known or not; the other type's rows want a freed name.
                if known {
                    session.find::<Folder>(2)?;
                }
                let (root, leaf) = (session.find::<Folder>(1)?, session.find::<Folder>(3)?);
                leaf.write().parent_id = Some(4);
                session.delete(&root)?;
                session.add(NewFolder { id: 5, parent_id: None, name: "new".into() })?;
                session.commit()
            })?;
            assert_eq!(ids(shop, "folders"), ["3", "4", "5"]);
            inside(shop, |session| {
                let (photo, ada) = (session.find::<Photo>(1)?, session.find::<Owner>(1)?);
                if known {
                    session.find::<Album>(1)?;
                }
                photo.write().album_id = 2;
                session.delete(&ada)?;
                session.add(NewOwner { id: 3, name: "Eve".into() })?;
                session.commit()
            })?;
            assert_eq!(
                (ids(shop, "photos"), ids(shop, "owners")),
                (vec!["1".into(), "2".into()], vec!["2".into(), "3".into()])
            );
            Ok(())
        });
    }
}

/// Fewer columns of the table of `Owner`.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[diesel(table_name = owners)]
#[entity(connection = AnyConnection)]
pub struct OwnerKey {
    pub id: i32,
}

/// Fewer columns of the table of `Folder`.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[diesel(table_name = folders)]
#[entity(connection = AnyConnection)]
pub struct FolderParent {
    pub id: i32,
    #[entity(references = Folder)]
    pub parent_id: Option<i32>,
}

#[test]
fn rows_of_a_table_with_two_entities_are_in_one_order() {
    test_on(Fixture::sql("gallery", TABLES.replace(" ON DELETE CASCADE", "")), |shop| {
        inside(shop, |session| {
            // The relation is that of the other entity of the table.
            let ada = session.find::<OwnerKey>(1)?;
            let (album, photo) = (session.find::<Album>(1)?, session.find::<Photo>(1)?);
            session.delete(&ada)?;
            session.delete(&album)?;
            session.delete(&photo)?;
            session.flush()?;
            session.rollback()?;
            // A row that is moved away from the one that is deleted.
            let (ada, album) = (session.find::<OwnerKey>(1)?, session.find::<Album>(1)?);
            album.write().owner_id = 2;
            session.delete(&ada)?;
            session.add(NewOwner { id: 3, name: "Ada".into() })?;
            session.flush()?;
            session.rollback()?;
            // A unique value that another entity's row frees.
            let (ada, album) = (session.find::<OwnerKey>(1)?, session.find::<Album>(1)?);
            let photo = session.find::<Photo>(1)?;
            session.delete(&ada)?;
            session.delete(&album)?;
            session.delete(&photo)?;
            session.add(NewOwner { id: 4, name: "Ada".into() })?;
            session.flush()?;
            session.rollback()?;
            // A tree of rows of both entities.
            let (root, leaf) = (session.find::<Folder>(1)?, session.find::<Folder>(3)?);
            session.delete(&session.find::<FolderParent>(2)?)?;
            session.delete(&root)?;
            session.delete(&leaf)?;
            session.commit()
        })?;
        assert_eq!(ids(shop, "folders"), ["4"]);
        Ok(())
    });
}

#[test]
fn foreign_keys_of_two_columns_order_a_flush_and_expire_rows() {
    gallery(|shop| {
        for bed_first in [false, true] {
            inside(shop, |session| {
                if bed_first {
                    session.get::<Bed>(0)?;
                }
                // The bed is added first and inserted last.
                let bed = session.add(NewBed { id: 7, house: 2, room: Some(1), name: "new".into() })?;
                let room = session.add(NewRoom { house: 2, number: 1, name: "green".into() })?;
                session.flush()?;
                session.delete(&room)?;
                session.flush()?;
                assert_eq!((session.get::<Bed>(7)?, bed.state()), (None, RowState::Deleted));
                let (room, wide, lost) =
                    (session.find::<Room>((1, 1))?, session.find::<Bed>(1)?, session.find::<Bed>(2)?);
                session.delete(&room)?;
                session.delete(&wide)?;
                session.delete(&lost)?;
                session.flush()?;
                assert_eq!([room.state(), wide.state(), lost.state()], [RowState::Deleted; 3]);
                session.rollback()
            })?;
            // A bed is moved away before its room goes.
            inside(shop, |session| {
                let (room, wide) = (session.find::<Room>((1, 1))?, session.find::<Bed>(1)?);
                wide.write().room = Some(2);
                session.delete(&room)?;
                session.add(NewRoom { house: 3, number: 3, name: "blue-green".into() })?;
                session.commit()
            })?;
            assert_eq!(shop.ask("SELECT name AS value FROM beds WHERE room = 2"), ["wide"]);
            elsewhere(
                shop,
                "DELETE FROM rooms WHERE house = 3; INSERT INTO rooms VALUES (1, 1, 'blue'); UPDATE beds SET room = 1 WHERE id = 1",
            );
        }
        Ok(())
    });
}
