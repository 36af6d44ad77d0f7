# Fails if an object compiled for one instruction set defines a symbol that the linker may share with
# other units (weak or unique, as inline functions are) and whose name does not carry that instruction
# set's namespace: a machine without it could be handed its code.
# Variables: NM, ISA, OBJECTS.
execute_process(COMMAND ${NM} --defined-only ${OBJECTS}
  OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(LENGTH "${ISA}" length)
string(REPLACE "\n" ";" symbols "${symbols}")
set(shared)
foreach(symbol IN LISTS symbols)
  # DW.ref.* is a pointer to the C++ exception personality, the same in every unit.
  if(symbol MATCHES " [WVu] " AND NOT symbol MATCHES "${length}${ISA}| DW\\.ref\\.")
    list(APPEND shared "${symbol}")
  endif()
endforeach()
if(shared)
  list(JOIN shared "\n  " shared)
  message(FATAL_ERROR "${ISA} kernels define symbols outside their namespace:\n  ${shared}")
endif()
