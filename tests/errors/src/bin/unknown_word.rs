//~ error: `genrated` is not known here; there is `generated`, `version` and `references = Entity` on a field
//~ #[entity(genrated)]
use diesel::prelude::*;
use diesel_session::Entity;
use errors::schema::users;

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = users)]
pub struct User {
    #[entity(genrated)]
    pub id: i32,
    pub name: String,
}

fn main() {}
