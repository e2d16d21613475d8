//~ error[E0277]: `Plain` is not an entity on `SqliteConnection`
//~ add `#[derive(Entity)]` beside `#[derive(Queryable, Selectable)]` of `Plain`
use diesel::prelude::*;
use errors::schema::users;
use errors::{DB, Db};

#[derive(Queryable, Selectable)]
#[diesel(table_name = users)]
struct Plain {
    id: i32,
}

fn main() {
    let session: Db = DB.session().unwrap();
    let _ = session.track::<Plain>(users::table.select(users::id));
}
