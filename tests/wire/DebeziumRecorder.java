import io.debezium.engine.ChangeEvent;
import io.debezium.engine.DebeziumEngine;
import io.debezium.engine.Header;
import io.debezium.engine.format.Json;
import io.debezium.engine.format.KeyValueHeaderChangeEventFormat;
import java.io.FileInputStream;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.Base64;
import java.util.Properties;

/** Prints every record of Debezium's embedded engine: topic, key, value and headers in base64, "-" for null. */
public class DebeziumRecorder {
    private static final PrintStream OUT = new PrintStream(System.out, true, StandardCharsets.UTF_8);

    public static void main(String[] arguments) throws Exception {
        Properties properties = new Properties();
        properties.load(new FileInputStream(arguments[0]));
        DebeziumEngine<ChangeEvent<String, String>> engine =
                DebeziumEngine.create(KeyValueHeaderChangeEventFormat.of(Json.class, Json.class, Json.class))
                        .using(properties)
                        .notifying(DebeziumRecorder::print)
                        .build();
        engine.run();
    }

    private static void print(ChangeEvent<String, String> event) {
        StringBuilder line = new StringBuilder(event.destination())
                .append(' ').append(encoded(event.key())).append(' ').append(encoded(event.value()));
        for (Object header : event.headers()) {
            Header<?> each = (Header<?>) header;
            line.append(' ').append(each.getKey()).append('=').append(encoded((String) each.getValue()));
        }
        OUT.println(line);
    }

    private static String encoded(String text) {
        return text == null ? "-" : Base64.getEncoder().encodeToString(text.getBytes(StandardCharsets.UTF_8));
    }
}
